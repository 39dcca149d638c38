"""Timing on a GPU: by its own events, from CUDA graphs, and what launching from Python costs beside."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Call = Callable[[int], object]
CYCLES_PER_SECOND = 2e9
"""About what a GPU's clock makes; only how long it is kept busy depends on it."""
LONGEST_WAIT = 0.02
"""Seconds; a call that takes the host longer is timed with the gaps that it leaves."""


class EventClock:
    """Seconds of a call on the GPU between two events.

    The GPU is kept busy until the host has launched the whole call, so that no gap between launches counts; a call
    that waits for the GPU itself counts with that wait.
    """

    def __init__(self) -> None:
        self._launching: dict[Call, float] = {}

    def __call__(self, call: Call, turn: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        wait = min(1.5 * self._launching.get(call, LONGEST_WAIT / 2) + 5e-5, LONGEST_WAIT)
        torch.cuda._sleep(int(wait * CYCLES_PER_SECOND))
        began = time.perf_counter()
        start.record()
        call(turn)
        end.record()
        launched = time.perf_counter() - began
        end.synchronize()
        self._launching[call] = min(launched, self._launching.get(call, launched))
        return start.elapsed_time(end) / 1e3


class GraphClock:
    """Seconds of a call replayed from a CUDA graph, as an engine replays a step of decode.

    The graph holds ``calls`` calls, so that inputs that take turns have left the caches when they come again.
    """

    def __init__(self, call: Call, calls: int) -> None:
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for turn in range(3):
                call(turn)
        current.wait_stream(stream)
        torch.cuda.synchronize()
        self.calls, self.graph = calls, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for turn in range(1, calls + 1):
                call(turn)

    def __call__(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.calls


def seconds_one_by_one(call: Call, calls: int = 50) -> float:
    """Seconds a call takes where Python launches one behind the other: the GPU's time, or the host's if it is more."""
    for turn in range(3):
        call(turn)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for turn in range(calls):
        call(turn)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls
