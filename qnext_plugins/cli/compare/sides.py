"""What the command line says about a side, and the command that starts it."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from pathlib import Path
from urllib.parse import urlsplit

REFEREE = Path(__file__).with_name("referee.py")
ENGINES = ("vllm", "sglang", "hf")
FORMS = "expected a URL (http://...), or vllm:MODEL, sglang:MODEL or hf:MODEL with flags, optionally after name="
NAMED = re.compile(r"(?P<name>[A-Za-z][\w.-]*)=(?=(vllm|sglang|hf):|https?://)")


class SpecError(ValueError):
    """One line about an argument that names no side."""


@dataclass(frozen=True)
class SideSpec:
    """A side: a server's URL, or an engine with a model and flags."""

    spec: str
    """As it was given."""
    name: str
    kind: str
    """``vllm``, ``sglang``, ``hf``, or ``url``."""
    target: str
    """The URL, or the model."""
    flags: tuple[str, ...] = ()
    without_drafts_of: str | None = None

    @property
    def started(self) -> bool:
        """Whether it is we who start the server."""
        return self.kind != "url"

    @property
    def dtype(self) -> str | None:
        """What its flags say it computes in; None if they leave that to the engine."""
        words = [word for flag in self.flags for word in flag.split("=", 1)]
        dtype = next((after for word, after in pairwise(words) if word == "--dtype"), "auto")
        return None if dtype == "auto" else {"float": "float32", "half": "float16"}.get(dtype, dtype)

    @property
    def speculates(self) -> bool:
        return self.flags != _without_speculation(self.flags)

    def without_speculation(self) -> SideSpec:
        """The same side without the flags of speculation."""
        return replace(
            self,
            name=f"{self.name}-no-drafts",
            flags=_without_speculation(self.flags),
            without_drafts_of=self.name,
        )

    def command(self, python: str, port: int) -> list[str]:
        """The command that serves the model on 127.0.0.1 at ``port``."""
        address = ["--host", "127.0.0.1", "--port", str(port)]
        # -P: neither the current folder nor the script's is a place to import from.
        start = [python, "-P"]
        if self.kind == "vllm":
            return [*start, "-m", "vllm.entrypoints.cli.main", "serve", self.target, *address, *self.flags]
        if self.kind == "sglang":
            metrics = [] if "--enable-metrics" in self.flags else ["--enable-metrics"]
            return [*start, "-m", "sglang.launch_server", "--model-path", self.target, *address, *metrics, *self.flags]
        return [*start, str(REFEREE), self.target, *address, *self.flags]


@dataclass(frozen=True)
class Pythons:
    """The interpreter of each engine's environment."""

    vllm: str = field(default_factory=lambda: os.environ.get("QNEXT_VLLM_PYTHON") or sys.executable)
    sglang: str = field(default_factory=lambda: os.environ.get("QNEXT_SGLANG_PYTHON") or sys.executable)
    hf: str = field(default_factory=lambda: os.environ.get("QNEXT_HF_PYTHON") or sys.executable)

    @classmethod
    def given(cls, **pythons: str | None) -> Pythons:
        """Those that are not None, by engine, in place of the defaults."""
        return cls(**{kind: python for kind, python in pythons.items() if python})

    def of(self, kind: str) -> str:
        return {"vllm": self.vllm, "sglang": self.sglang, "hf": self.hf}[kind]


def parse_side(text: str, *, dtype: str | None = None) -> SideSpec:
    """The side that ``text`` describes; ``dtype`` is for the engines we start. Raises SpecError."""
    named = NAMED.match(text)
    rest = text[named.end() :] if named else text
    kind, colon, described = rest.partition(":")
    if kind in ("http", "https"):
        host = urlsplit(rest)
        if not host.netloc:
            raise SpecError(f"{text!r}: {FORMS}, got a URL without a host")
        return SideSpec(text, named["name"] if named else host.netloc, "url", rest.rstrip("/").removesuffix("/v1"))
    if kind not in ENGINES or not colon:
        raise SpecError(f"{text!r}: {FORMS}")
    try:
        words = shlex.split(described)
    except ValueError as error:
        raise SpecError(f"{text!r}: expected a model and flags, got {described!r} ({error})") from error
    if not words:
        raise SpecError(f"{text!r}: expected a model behind the colon, got none")
    model, *flags = words
    if any(flag.partition("=")[0] == "--port" for flag in flags):
        raise SpecError(f"{text!r}: expected flags without --port (the server gets a free one), got {described!r}")
    if dtype and not any(flag.partition("=")[0] == "--dtype" for flag in flags):
        flags += ["--dtype", dtype]
    if model.startswith("~"):
        model = str(Path(model).expanduser())
    return SideSpec(text, named["name"] if named else kind, kind, model, tuple(flags))


def check_model(side: SideSpec) -> None:
    """Raise SpecError for a model that is the path of no folder: engines take it for a name, and say so only later."""
    if side.started and side.target.startswith(("/", "./", "../")) and not Path(side.target).exists():
        raise SpecError(f"{side.spec!r}: expected a model's folder, and there is no {side.target}")


def parse_sides(texts: list[str], *, dtype: str | None = None, without_speculation: bool = False) -> list[SideSpec]:
    """All sides, with names of their own; with ``without_speculation`` each that speculates once more without.

    Raises SpecError, as :func:`check_model` does too.
    """
    sides: list[SideSpec] = []
    for side in (parse_side(text, dtype=dtype) for text in texts):
        check_model(side)
        taken = {other.name for other in sides}
        names = (f"{side.name}-{number}" for number in count(2))
        free = side.name if side.name not in taken else next(name for name in names if name not in taken)
        sides.append(replace(side, name=free))
    if len(sides) < 2:
        raise SpecError(f"expected two sides or more, got {len(sides)}")
    if without_speculation:
        sides += [side.without_speculation() for side in sides if side.started and side.speculates]
    return sides


def _without_speculation(flags: tuple[str, ...]) -> tuple[str, ...]:
    """``flags`` without those that begin with --speculative (in vLLM also -sc), and without their values."""
    kept: list[str] = []
    dropping = False
    for flag in flags:
        if flag.startswith("-"):
            dropping = flag.startswith("--speculative") or re.match(r"-sc\b", flag) is not None
        if not dropping:
            kept.append(flag)
    return tuple(kept)
