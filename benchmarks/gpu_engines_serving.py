"""How ``gpu_engines.py`` starts an engine, what it asks of it, and the weights of a slice; this imports no engine."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from qnext_plugins.cli.bench.stepped import EngineError, EngineProcess
from qnext_plugins.cli.checkpoint import Kind, Spec, plan
from qnext_plugins.cli.checkpoint.spec import Widths
from qnext_plugins.cli.checkpoint.tensors import Shape, Values
from qnext_plugins.cli.compare.servers import SERVED

Tokens = tuple[int, ...]
NAMES = {"vllm": "vLLM", "sglang": "SGLang"}
STATE_SLOTS = 5
"""Slots of recurrent state that a running request of SGLang holds at most; no request waits for one then."""
STRETCH = 1 << 24


@dataclass(frozen=True)
class Serving:
    """How one engine is started; what is not named here is the engine's default."""

    plugin: bool
    dtype: str
    checkpoint: str | None = None
    """A folder; without one the model is of ``config`` and has random weights."""
    config: dict[str, Any] = field(default_factory=dict)
    drafts: int = 0
    device: str = "cuda"
    eager: bool = False
    max_tokens: int = 1024
    """Of a request, prompt and answer."""
    requests: int = 64
    """That run at once, at most."""
    cache_bytes: int = 256 << 20
    """Of keys, values and states; what vLLM is told."""
    cache_tokens: int = 32768
    """Whose keys and values are kept; what SGLang is told."""
    counted: bool = False
    """Whether :meth:`AnyEngine.counters` is going to be asked."""
    options: dict[str, Any] = field(default_factory=dict)
    """More arguments of the engine, which go before all others."""


@dataclass(frozen=True)
class Answer:
    """A greedy continuation."""

    tokens: Tokens
    log_probs: tuple[float, ...]
    """Of each of the tokens, as the engine gave it."""
    prompt_log_probs: tuple[float, ...] = ()
    """Of each token of the prompt but the first, where they were asked for."""


class Counters(NamedTuple):
    """Since an engine was started."""

    cached: int
    """Tokens of prompts that came from the prefix cache."""
    steps: int
    """How often drafts were verified, once for each sequence."""
    accepted: int
    """Drafts."""


class AnyEngine(Protocol):
    """What the parts of the benchmark ask of an engine."""

    name: str

    def answers(self, prompts: Sequence[Tokens], max_tokens: int, read: bool = False) -> list[Answer]:
        """Greedy continuations of all prompts at once, end of sequence ignored; ``read``: with the prompts' scores."""

    def seconds(self, prompts: Sequence[Tokens], max_tokens: int) -> float:
        """Wall time of the same without log-probabilities."""

    def forget(self) -> None:
        """Empty the prefix cache."""

    def counters(self) -> Counters: ...

    def served_by(self) -> str | None:
        """The plugin's line in the engine's log; None where there is none."""


class Engine(EngineProcess):
    """The handle of a started engine; an :class:`AnyEngine`."""

    @classmethod
    def start(cls, kind: str, name: str, serving: Serving, log: Path) -> Self:
        """Start the engine ``kind`` and wait for it; raises EngineError."""
        environment = {"QNEXT_DISABLE": str(int(not serving.plugin))}
        if serving.plugin:
            environment["QNEXT_STRICT"] = os.environ.get("QNEXT_STRICT", "1")
        if kind == "sglang" and serving.dtype == "float32":
            # Its attention would multiply in TF32.
            environment["TRITON_F32_DEFAULT"] = os.environ.get("TRITON_F32_DEFAULT", "ieee")
        settings = {"serving": serving}
        module = f"gpu_engines_{kind}:RunningEngine"
        engine = cls.spawn(name, log, module, settings, environment=environment, children=True)
        try:
            engine.wait()
            if (engine.served_by() is not None) != serving.plugin:
                raise EngineError(f"{name}: the plugin {'does not serve' if serving.plugin else 'serves'}; see {log}")
        except EngineError:
            engine.stop()
            raise
        return engine

    def answers(self, prompts: Sequence[Tokens], max_tokens: int, read: bool = False) -> list[Answer]:
        return self.ask("answers", prompts, max_tokens, read)

    def seconds(self, prompts: Sequence[Tokens], max_tokens: int) -> float:
        return self.ask("seconds", prompts, max_tokens)

    def forget(self) -> None:
        self.ask("forget")

    def counters(self) -> Counters:
        return self.ask("counters")

    def served_by(self) -> str | None:
        found = SERVED.search(self.log.read_text(errors="replace"))
        return None if found is None else found[0]


@contextmanager
def model_folder(serving: Serving) -> Iterator[str]:
    """The folder that an engine is told to load."""
    if serving.checkpoint is not None:
        yield serving.checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="gpu-engines-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(serving.config))
        yield folder


def slice_spec(config: Mapping[str, Any]) -> Spec:
    """What a slice with this config.json is made of: plain random weights, in bfloat16, without a draft."""
    widths = Widths(**{name: config[name] for name in Widths.model_fields})
    return Spec(kind=Kind.RANDOM, widths=widths, mtp=False)


def random_weights(config: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint of ``config`` by their names, each a function of its name alone.

    An engine's own dummy weights are so small that its layers change nothing; and those of two models are not the same.
    """
    spec = slice_spec({name: getattr(config, name) for name in Widths.model_fields})
    values = QuickValues(spec, None)
    for name, shape in plan(spec).weights.items():
        yield name, values.make(name, shape)


class QuickValues(Values):
    """Of a checkpoint, but with noise that most tensors take from one stretch, each at a place of its own.

    Thousands of experts would take minutes to be drawn, and the GPU would wait for them.
    """

    @cached_property
    def stretch(self) -> Tensor:
        return super().noise("stretch", (STRETCH,))

    def noise(self, name: str, shape: Shape) -> Tensor:
        size = torch.Size(shape).numel()
        if size > STRETCH // 2:
            return super().noise(name, shape)
        start = int.from_bytes(sha256(name.encode()).digest()[:8], "little") % (STRETCH - size)
        return self.stretch[start : start + size].view(shape)
