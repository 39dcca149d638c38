#!/usr/bin/env python3
"""The least time that this CPU allows each operation, and so the most that any kernel can gain over vLLM's.

    python benchmarks/cpu_bounds.py [--threads 1,2] [--results FILE ...] [--csv FILE]

Measures float32 multiply-adds and BF16 dot products that stay in registers, and memory moved as the operation must move
it and no more (read; read in the order of attention's decode, beside its multiply-adds; read and written in place; read
once and written k times past the caches). A row's bound is the larger of its arithmetic and its memory alone, as if
they overlapped without loss. ``--results`` takes CSVs of cpu_ops.py and cpu_slice.py of the same machine: then the
table says how far ours is from the bound, and what ratio to vLLM a kernel at the bound would have.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from cpu_report import milliseconds, parse, print_and_write

from qnext_kernels import native, use_huge_pages
from qnext_plugins.cli.bench.inputs import REAL
from qnext_plugins.cli.bench.models import Slice, SliceWork
from qnext_plugins.cli.bench.roofs import OtherLoad, clock, describe_machine

COLUMNS = ("op", "shape", "threads", "least_ms", "bound", "ours_ms", "bound_pct", "peer_ms", "most_ratio")
TURNS = 7
"""Times that each rate is measured; the best counts."""
POOL = 256 << 20
"""Bytes of the memory that is read."""
STATE = REAL.linear_dim**2
"""Floats of one head's state of the delta rule: what a kernel moves at a time."""
SLICE = Slice(layers=4, experts=256)


@dataclass(frozen=True)
class Need:
    """What a call must do: FLOP by their kind; bytes, and in what pattern they move (see :class:`Rates`)."""

    op: str
    shape: str
    dots: float = 0
    float32: float = 0
    moved: float = 0
    pattern: str = "read"


@dataclass(frozen=True)
class Rates:
    """Of so many threads: FLOP/s of the two kinds of arithmetic, bytes/s by pattern, reads and writes counted alike."""

    dots: float
    float32: float
    memory: dict[str, float]

    def least(self, need: Need) -> tuple[float, str]:
        """Seconds, and what takes them."""
        arithmetic = need.dots / self.dots + need.float32 / self.float32
        memory = need.moved / self.memory[need.pattern]
        return max((arithmetic, "arithmetic"), (memory, f"memory, {need.pattern}"))

    def describe(self, threads: int) -> str:
        memory = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in self.memory.items())
        return (
            f"rates, threads={threads}: BF16 dot products {self.dots / 1e9:.0f} GFLOP/s, float32 multiply-adds "
            f"{self.float32 / 1e9:.0f} GFLOP/s; GB/s: {memory}"
        )


def needs() -> Iterator[Need]:
    """Of the rows of cpu_ops.py that have a target, and of cpu_slice.py's."""
    s = REAL
    expert = 3 * s.intermediate * s.hidden
    for tokens in s.expert_tokens:
        read = 2 * expert * min(s.experts, tokens * s.top_k)
        yield Need("experts", f"M={tokens}", dots=2 * expert * tokens * s.top_k, moved=read)
    # Scores are BF16 dot products, weights times values float32 (docs/features.md, "Speed").
    for tokens in s.prefills:
        half = 2 * s.heads * s.head_dim * tokens * (tokens + 1) / 2
        yield Need("attention prefill", f"T={tokens}", dots=half, float32=half)
    for context in s.contexts:
        half, cache = 2 * s.heads * s.head_dim * context, 4 * s.kv_heads * s.head_dim * context
        shape = f"B=1 context={context}"
        yield Need("attention decode", shape, dots=half, float32=half, moved=cache, pattern="read and multiply")
    # Of the state's size a token and head: S q in BF16 dot products, S k and the rank-one update of S in float32.
    product, state = 2 * STATE * s.value_heads, 4 * STATE * s.value_heads
    for tokens in s.prefills:
        yield Need("delta rule prefill", f"T={tokens}", dots=product * tokens, float32=2 * product * tokens)
    for batch in s.batches:
        yield Need("delta rule decode", f"B={batch}", moved=2 * batch * state, pattern="update")
    for batch in s.batches:
        tokens = 1 + s.drafts
        moved = (1 + tokens) * batch * state
        yield Need("delta rule verify", f"B={batch} × {tokens} tokens", moved=moved, pattern=f"copy to {tokens}")
    for tokens in s.conv_prefills:
        yield Need("conv prefill", f"T={tokens}", moved=4 * tokens * s.channels, pattern="copy to 1")
    work = SliceWork(SLICE)
    for tokens in (512, 2048):
        yield Need("prefill", f"T={tokens}", dots=work.flops(tokens, tokens))
    for context in (128, 32768):
        yield Need("decode", f"context={context}", moved=work.decode(context))


def compile_loops(folder: Path) -> ctypes.CDLL:
    """cpu_bounds.cpp for this processor, with the kernels' own compiler and flags."""
    flags, library = native.FLAGS_OF_ISA[native.instruction_set()], folder / "cpu_bounds.so"
    source, runtime = Path(__file__).with_suffix(".cpp"), Path(torch.__file__).parent / "lib"
    native.run([*native.compiler(), *native.FLAGS, *flags, "-shared", str(source), "-o", str(library), f"-L{runtime}"])
    return ctypes.CDLL(str(library))


def measure(loops: ctypes.CDLL, threads: int) -> Rates:
    """The best of some turns of each loop."""
    torch.set_num_threads(threads)
    now = clock(threads)

    def best(work: float, call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(TURNS):
            start = now()
            call()
            seconds.append(now() - start)
        return work / min(seconds)

    def arithmetic(loop: Callable[..., int]) -> float:
        rounds = ctypes.c_int64(2_000_000)
        return best(threads * loop(rounds), partial(loop, rounds))

    def memory(loop: Callable[..., None], directions: int, *arguments: int) -> float:
        blocks, size, *rest = map(ctypes.c_int64, (POOL // 4 // STATE, STATE, *arguments))
        return best(directions * POOL, lambda: loop(pointer, *where, blocks, size, *rest))

    for loop in (loops.float32_multiply_adds, loops.bfloat16_dot_products):
        loop.restype = ctypes.c_int64
    data, to = torch.ones(POOL // 4), torch.ones((1 + REAL.drafts) * POOL // 4)
    use_huge_pages(data, to)
    pointer, where = ctypes.c_void_p(data.data_ptr()), list[ctypes.c_void_p]()
    rates = {
        "read": memory(loops.read_blocks, 1),
        "read and multiply": memory(loops.multiply_blocks, 1),
        "update": memory(loops.update_blocks, 2),
    }
    where = [ctypes.c_void_p(to.data_ptr())]
    for copies in (1, 1 + REAL.drafts):
        rates[f"copy to {copies}"] = memory(loops.copy_blocks, 1 + copies, copies)
    float32 = arithmetic(loops.float32_multiply_adds)
    return Rates(arithmetic(loops.bfloat16_dot_products) or float32, float32, rates)


Measured = dict[tuple[str, str, int], tuple[float, float | None]]
"""By operation, shape and threads: seconds of ours and of vLLM's own."""


def read_results(files: list[Path]) -> Measured:
    """What cpu_ops.py and cpu_slice.py have measured; later files replace earlier ones."""
    measured: Measured = {}
    for path in files:
        with path.open() as file:
            for row in csv.DictReader(line for line in file if not line.startswith("#")):
                peer = None if row["peer_ms"] == "-" else float(row["peer_ms"]) / 1e3
                measured[row["op"], row["shape"], int(row["threads"])] = float(row["ours_ms"]) / 1e3, peer
    return measured


def rows(rates: dict[int, Rates], measured: Measured) -> Iterator[tuple[str, ...]]:
    """The cells of :data:`COLUMNS`."""
    for need in needs():
        for threads, rate in rates.items():
            least, bound = rate.least(need)
            ours, peer = measured.get((need.op, need.shape, threads), (None, None))
            yield (
                *(need.op, need.shape, str(threads), milliseconds(least), bound),
                *(("-", "-") if ours is None else (milliseconds(ours), f"{100 * least / ours:.0f}")),
                *(("-", "-") if peer is None else (milliseconds(peer), f"{peer / least:.2f}")),
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", default=[], metavar="FILE", help="measured on this machine")
    args = parse(parser, plot=False)

    header, others = describe_machine(), OtherLoad()
    with tempfile.TemporaryDirectory() as folder:
        loops = compile_loops(Path(folder))
        rates = {threads: measure(loops, threads) for threads in args.threads}
    header += [rate.describe(threads) for threads, rate in rates.items()]
    header.append(others.describe())
    cells = list(rows(rates, read_results(args.results)))
    print_and_write(args.csv, header, COLUMNS, cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
