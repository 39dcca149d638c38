"""``qnext bench``: kernels beside their reference and their peers, servers under load, the release's claims.

What an engine contributes lies in the engine's package, behind the entry point group ``qnext_plugins.bench``: each
entry is an :class:`EngineBench`. This package imports no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qnext_plugins.cli.bench.inputs import Library

GROUP = "qnext_plugins.bench"


@dataclass(frozen=True)
class EngineBench:
    """What an engine's package gives the benchmarks; importing it must not import the engine."""

    name: str
    peers: Callable[[str], Library | str]
    """Its own kernels for a device type, or why there are none."""
    engine: str | None = None
    """``module:class`` of an engine that is told step by step what to run, for layer slices."""


def engine_benches() -> list[EngineBench]:
    """What the engines' packages give, installed or not."""
    return [entry.load() for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)]
