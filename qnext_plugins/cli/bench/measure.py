"""Whether the sides of a case agree, and how long each takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qnext_plugins.cli.bench.inputs import BF16, Case, Side
from qnext_plugins.cli.bench.roofs import interleave, timer

Outcome = list[Tensor]
TOLERANCE = 2 * torch.finfo(BF16).eps
"""Of the norm of the difference, relative: bfloat16's rounding."""


def outcome_of_ours(case: Case) -> Outcome:
    """Results and states of run 0 of ours; the pools are afterwards as they were."""
    before = [pool.clone() for pool in case.pools]
    found = _outcome(case, case.ours, case.states)
    for pool, old in zip(case.pools, before, strict=True):
        pool.copy_(old)
    return found


def outcome_of_peer(case: Case, peer: Side) -> Outcome:
    """The same of a peer, which keeps what it wrote."""
    return _outcome(case, peer.call, peer.states)


def difference(found: Outcome, expected: Outcome) -> str | None:
    """How two outcomes differ by more than their rounding, or None."""
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        a, b = a.double().flatten(), b.double().flatten()
        error = float((a - b).norm() / b.norm())
        if not error <= TOLERANCE:
            return f"result {n} differs by {error:.1%}"
    return None


def seconds_of(
    sides: list[Side], threads: int, compiled: bool, seconds: float, least: int, device: str = "cpu"
) -> list[float]:
    """Median seconds of each side, in turns, with so many threads."""
    torch.set_num_threads(threads)
    time = timer(threads, device)

    def timed(side: Side, turn: int) -> float:
        with side.within():
            return time(side.call, turn)

    for side in sides:
        side.retune()
        if compiled:
            timed(side, 0)  # compiles for this number of threads
    return interleave([partial(timed, side) for side in sides], seconds, least)


def _outcome(case: Case, call: Callable[[int], Any], states: Callable[[], list[Tensor]]) -> Outcome:
    result = case.comparable(call(0))
    # Copies, for the next call may write where this one did.
    return [each.clone() for each in ((result,) if isinstance(result, Tensor) else result)] + [
        each.clone() for each in states()
    ]
