#!/usr/bin/env python3
"""Time to the first token of a prompt that vLLM runs in one step, and in two, cut where its prefix cache keeps a state.

    python benchmarks/prefill_steps.py [--experts 512] [--tokens 1200,1300,2048] [--threads 1,2] [--turns 4]

One engine with the plugin, on layers at real widths with random weights (13 GB with 512 experts), runs prompts that no
cache knows in both ways in turns, so that both have the same memory and compiled code. Without the plugin it is always
two. Medians count; the first turn warms up.
"""

from __future__ import annotations

import argparse
import random
import statistics

from cpu_report import positive_numbers
from cpu_slice_engine import RunningEngine, Side
from rich.console import Console
from rich.table import Table

from qnext_plugins.cli.bench.models import Slice
from qnext_plugins.cli.bench.roofs import OtherLoad, describe_machine


def measure(engine: RunningEngine, tokens: int, threads: int, turns: int) -> dict[bool, float]:
    """Median seconds in one step (True) and in two."""
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    seconds: dict[bool, list[float]] = {True: [], False: []}
    rng = random.Random(tokens)
    for turn in range(turns + 1):
        for one in (True, False) if turn % 2 else (False, True):
            scheduler.mamba_has_prefill_checkpoint_blocks = one
            taken = engine.prefill(rng.choices(range(1, Slice.vocabulary), k=tokens), threads)
            engine.finish()
            if turn:
                seconds[one].append(taken)
    return {one: statistics.median(times) for one, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="a multiple of 4 (default 4)")
    parser.add_argument("--experts", type=int, default=512, help="default 512, as published")
    parser.add_argument("--tokens", type=positive_numbers, default="1200,1300,2048", help="default 1200,1300,2048")
    parser.add_argument("--threads", type=positive_numbers, default="1,2", help="default 1,2")
    parser.add_argument("--turns", type=int, default=4, help="default 4")
    args = parser.parse_args()
    others, config = OtherLoad(), Slice(args.layers, args.experts, Slice.vocabulary, fp8=False).config()
    engine = RunningEngine(Side("one step or two", plugin=True, chunk=max(args.tokens)), config, max(args.threads))
    block = engine.llm.llm_engine.vllm_config.cache_config.block_size
    table = Table("tokens", "threads", "one step, s", "two steps, s", "two / one", title=f"blocks of {block} tokens")
    for threads in args.threads:
        for tokens in args.tokens:
            seconds = measure(engine, tokens, threads, args.turns)
            ratio = f"{seconds[False] / seconds[True]:.2f}"
            table.add_row(str(tokens), str(threads), f"{seconds[True]:.3f}", f"{seconds[False]:.3f}", ratio)
    Console().print(table, *describe_machine(), others.describe(), sep="\n")


if __name__ == "__main__":
    main()
