"""Times a server's streams with so many requests at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import numpy as np

from qnext_plugins.cli.compare.answers import SideError
from qnext_plugins.cli.compare.client import Client, Timing
from qnext_plugins.cli.compare.prompts import marked
from qnext_plugins.cli.compare.report import Level, Prompt, Times

MOST_FAILURES = 3
"""In a row; after these a side is not asked further of the same kind."""


async def measure(
    client: Client,
    prompts: Sequence[Prompt],
    *,
    concurrency: int,
    requests: int,
    max_tokens: int,
    done: Callable[[], None],
) -> tuple[Level | None, list[str]]:
    """Stream ``requests`` continuations, ``concurrency`` at a time; the level and a line for each failed request.

    Every request begins with a mark of its own, so that no cached prefix shortens its prefill. After ``MOST_FAILURES``
    the rest is not asked. ``done`` is called after each request.
    """
    numbers = iter(range(requests))
    timings: list[Timing] = []
    failures: list[str] = []
    in_a_row = 0

    async def work() -> None:
        nonlocal in_a_row
        for number in numbers:
            if in_a_row >= MOST_FAILURES:
                return
            prompt = marked(prompts[number % len(prompts)], f"[{concurrency}.{number}]")
            try:
                timings.append(await client.stream(prompt, max_tokens))
                in_a_row = 0
            except SideError as error:
                failures.append(f"request {number} at concurrency {concurrency}: {error}")
                in_a_row += 1
            done()

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    seconds = time.perf_counter() - start
    return (summarise(timings, concurrency, len(failures), seconds) if timings else None), failures


def summarise(timings: Sequence[Timing], concurrency: int, failed: int, seconds: float) -> Level:
    """The level of requests that took ``seconds`` together."""
    tokens = sum(timing.tokens for timing in timings)
    gaps = [(timing.last - timing.first) / (timing.tokens - 1) for timing in timings if timing.tokens > 1]
    return Level(
        concurrency=concurrency,
        requests=len(timings) + failed,
        failed=failed,
        tokens=tokens,
        counted_by="usage" if all(timing.counted for timing in timings) else "chunks",
        tokens_per_second=tokens / seconds,
        first_token=percentiles([timing.first for timing in timings]),
        inter_token=percentiles(gaps) if gaps else None,
    )


def percentiles(seconds: Sequence[float]) -> Times:
    """The median and the 95th percentile."""
    p50, p95 = np.percentile(seconds, [50, 95])
    return Times(p50=float(p50), p95=float(p95))
