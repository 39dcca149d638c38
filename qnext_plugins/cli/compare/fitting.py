"""Flags of our own for engines that we start on a CPU, so that they run beside each other in one memory.

vLLM takes nine tenths of a machine's memory for itself, and SGLang what it finds. Each side gets an equal share of what
is free instead, unless its flags say what it may take.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from qnext_plugins.cli.compare.sides import SideSpec
from qnext_plugins.cli.doctor.machine import memory_bytes

SHARED = 0.8
"""Of the memory that is free; the rest is for what none of them plans for."""
# Flags and variables with which a user says how much an engine may take; a file of flags may say anything.
SAID = {
    "vllm": ("--gpu-memory-utilization", "--kv-cache-memory-bytes", "--num-gpu-blocks-override", "--config"),
    "sglang": ("--mem-fraction-static", "--max-total-tokens", "--config"),
}
VARIABLES = {"vllm": ("VLLM_CPU_KVCACHE_SPACE",), "sglang": ()}


@dataclass(frozen=True)
class Fitting:
    """Flags to add, and a line that says so."""

    flags: tuple[str, ...] = ()
    line: str | None = None


def fitting(spec: SideSpec, sides: int, *, on_cpu: bool) -> Fitting:
    """What ``spec`` gets where ``sides`` of them run at once."""
    flags: list[str] = []
    if spec.kind in SAID and on_cpu:
        if spec.kind == "sglang" and not _has(spec, "--device"):
            flags += ["--device", "cpu"]
        if not _has(spec, *SAID[spec.kind]) and not any(os.environ.get(name) for name in VARIABLES[spec.kind]):
            flags += _share(spec.kind, sides)
    if not flags:
        return Fitting()
    return Fitting(tuple(flags), f"started with {' '.join(flags)}, to fit on this CPU beside the others")


def _share(kind: str, sides: int) -> list[str]:
    memory = memory_bytes()
    share = SHARED / sides
    if kind == "sglang":
        # Of the memory that is free when it starts.
        return ["--mem-fraction-static", _rounded_down(share)]
    # Of all memory, of which this much must be free when it starts.
    return ["--gpu-memory-utilization", _rounded_down(share * memory["MemAvailable"] / memory["MemTotal"])]


def _rounded_down(share: float) -> str:
    return f"{max(math.floor(share * 100) / 100, 0.01):.2f}"


def _has(spec: SideSpec, *names: str) -> bool:
    """Whether a flag of ``spec`` is one of these; vLLM takes underscores in names too."""
    given = {flag.partition("=")[0].replace("_", "-") for flag in spec.flags if flag.startswith("--")}
    return not given.isdisjoint(names)
