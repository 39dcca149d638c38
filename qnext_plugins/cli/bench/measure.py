"""Whether the sides of a case agree, and how long each takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qnext_plugins.cli.bench.cuda import GraphClock, seconds_one_by_one
from qnext_plugins.cli.bench.inputs import TOLERANCE, Case, Side
from qnext_plugins.cli.bench.roofs import interleave, timer
from qnext_plugins.cli.doctor.findings import one_line

Outcome = list[Tensor]
PIECE = 1 << 26
"""Elements that are compared at a time, in float64."""


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


def difference(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = TOLERANCE) -> str | None:
    """How two outcomes differ by more than their rounding, or None."""
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.numel() != b.numel():
            return f"result {n} has shape {list(a.shape)} in place of {list(b.shape)}"
        error = square = 0.0
        for x, y in zip(a.flatten().split(PIECE), b.flatten().split(PIECE), strict=True):
            x, y = x.double(), y.double()
            error += float((x - y).square().sum())
            square += float(y.square().sum())
        if not error <= tolerance**2 * square:  # nor where one is NaN
            relative = (error / square) ** 0.5 if square else float("inf")
            return f"result {n} differs by {relative:.1%}"
    return None


@dataclass(frozen=True)
class Timed:
    """What a side takes."""

    seconds: float
    one_by_one: float | None = None
    """Where ``seconds`` is from a CUDA graph: of a call where Python launches one behind the other."""
    note: str | None = None
    """Why it is not from a CUDA graph, though it is part of a step of decode."""


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


def graph_times(sides: list[Side], sets: int, seconds: float, least: int) -> list[Timed]:
    """Of calls that a GPU replays from CUDA graphs; a side that cannot be captured is timed launch by launch."""
    clocks: list[Callable[[], float]] = []
    found: list[Timed | None] = []
    for side in sides:
        with side.within():
            try:
                clock = GraphClock(side.call, max(16, sets))
            # Whatever a library does that a graph cannot hold.
            except Exception as error:
                torch.cuda.synchronize()
                (alone,) = seconds_of([side], 1, False, seconds / len(sides), least, "cuda")
                found.append(Timed(alone, note=f"not captured in a CUDA graph: {one_line(error)}"))
            else:
                clocks.append(clock)
                found.append(None)
    medians = iter(interleave([partial(_ignoring_the_turn, clock) for clock in clocks], seconds, least))
    return [
        Timed(next(medians), _one_by_one(side)) if timed is None else timed
        for side, timed in zip(sides, found, strict=True)
    ]


def _one_by_one(side: Side) -> float:
    with side.within():
        return seconds_one_by_one(side.call)


def _ignoring_the_turn(clock: Callable[[], float], turn: int) -> float:
    return clock()


def _outcome(case: Case, call: Callable[[int], Any], states: Callable[[], list[Tensor]]) -> Outcome:
    result = case.comparable(call(0))
    # Copies, for the next call may write where this one did.
    return [each.clone() for each in ((result,) if isinstance(result, Tensor) else result)] + [
        each.clone() for each in states()
    ]
