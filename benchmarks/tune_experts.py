#!/usr/bin/env python3
"""Measure block sizes, warps and stages of the experts' products on this GPU, and write the file that calls read.

    python benchmarks/tune_experts.py [--ranks 1,2,4,8] [--tokens 1,8,64,512] [--weights bfloat16,float8_e4m3fn]

The layers are those of Qwen3-Next-80B-A3B on a rank of tensor parallelism, with random weights and routing. All
candidates are compiled first, in as many processes as there are cores. For each number of rows of a block, that of the
rule, half and twice of it, both products are measured apart, from a cold cache, and the fastest of each together with
the sorting of the choices decides. Candidates that do not fit the GPU, or whose result is not that of the rule, are
left out, and so are numbers of tokens that are too few for blocks. The file is
kernels/qnext_kernels/moe/tuned/<name of the GPU>.json; what is in it already and is not measured again stays.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor

from qnext_kernels.fp8 import FP8_GROUP
from qnext_kernels.moe.configurations import (
    TUNED,
    Configuration,
    Product,
    Shape,
    few,
    file_of,
    load,
    rule,
    save,
)
from qnext_kernels.moe.triton_experts import Call, Weights
from qnext_kernels.moe.triton_fp8 import quantize
from qnext_kernels.triton_support import Target, current_target, power_of_two

EXPERTS, TOP_K, HIDDEN, MIDDLE = 512, 10, 2048, 512
MOST_SUMS = 128
"""Registers of a thread that hold sums."""
Clock = Callable[[Callable[[], object]], float]
"""Milliseconds that a function takes."""


def candidates(width: int, size: int, rows: int, *, paired: bool, fp8: bool) -> Iterator[Product]:
    """Products of ``width`` columns that are sums of ``size`` elements, with what a GPU has room for.

    Args:
        paired: of the first product, each of whose columns is two rows of weights.
    """
    per_column, itemsize = (2 if paired else 1), (1 if fp8 else 2)
    depths = sorted({min(depth, max(32, power_of_two(size))) for depth in ((FP8_GROUP,) if fp8 else (64, 128))})
    most = min(256 // per_column, max(16, power_of_two(width)), FP8_GROUP if fp8 else 256)
    widths = [columns for columns in (16, 32, 64, 128, 256) if columns <= most]
    for columns, depth, warps, swapped in itertools.product(widths, depths, (4, 8), (False, True)):
        sums = rows * columns * per_column * (2 if fp8 else 1) // (32 * warps)
        if sums > MOST_SUMS or (warps == 8 and rows * columns * per_column < 8192):
            continue
        for stages in sorted({min(stages, -(-size // depth)) for stages in (2, 3, 4, 5, 6)}):
            loaded = stages * depth * (rows + columns * per_column) * itemsize
            if loaded <= current_target().shared_memory:
                yield Product(columns, depth, warps, stages, swapped)


def rows_of(shape: Shape, tokens: int) -> list[int]:
    """The numbers of rows that are measured."""
    by_rule = rule(shape, tokens, current_target()).rows
    return sorted({min(128, max(16, rows)) for rows in (by_rule // 2, by_rule, by_rule * 2)})


def both(shape: Shape, rows: int) -> tuple[list[Product], list[Product]]:
    """Candidates of both products."""
    fp8 = shape.itemsize == 1
    up = candidates(shape.middle, shape.hidden, rows, paired=True, fp8=fp8)
    return list(up), list(candidates(shape.hidden, shape.middle, rows, paired=False, fp8=fp8))


def compile_product(shape: Shape, rows: int, product: Product, *, is_up: bool) -> None:
    """Launch a product on one token, so that it lies in Triton's cache."""
    x, weights, topk_weights, topk_ids = random_call(shape._replace(experts=1, top_k=1), 1, "cuda")
    weights = Weights(
        weights.w13.expand(shape.experts, -1, -1),
        weights.w2.expand(shape.experts, -1, -1),
        None if weights.w13_scale is None else weights.w13_scale.expand(shape.experts, -1, -1),
        None if weights.w2_scale is None else weights.w2_scale.expand(shape.experts, -1, -1),
    )
    topk_weights, topk_ids = topk_weights.repeat(1, shape.top_k), topk_ids.repeat(1, shape.top_k)
    config = Configuration(rows, product, product)
    try:
        call = Call(x, weights, None, topk_weights, topk_ids, config, current_target())
        values = x if is_up else x.new_zeros(shape.top_k, shape.middle)
        operands = quantize(values, decode=False) if shape.itemsize == 1 else (values,)
        (call.up if is_up else call.down)(*operands)
    except (triton.OutOfResources, triton.CompilationError):
        pass  # said where it is measured


def random_call(shape: Shape, tokens: int, device: str) -> tuple[Tensor, Weights, Tensor, Tensor]:
    """Tokens, weights and choices of a random layer."""
    double, groups = 2 * shape.middle, (-(-shape.middle // FP8_GROUP), -(-shape.hidden // FP8_GROUP))
    x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device=device)
    w13 = torch.randn(shape.experts, double, shape.hidden, dtype=torch.bfloat16, device=device) * shape.hidden**-0.5
    w2 = torch.randn(shape.experts, shape.hidden, shape.middle, dtype=torch.bfloat16, device=device)
    w2 *= shape.middle**-0.5
    scores, ids = torch.randn(tokens, shape.experts, device=device).topk(shape.top_k)
    dtype = getattr(torch, shape.weights)
    scales: tuple[Tensor, ...] = ()
    if dtype == torch.float8_e4m3fn:
        scales = (
            torch.ones(shape.experts, 2 * groups[0], groups[1], device=device),
            torch.ones(shape.experts, groups[1], groups[0], device=device),
        )
    return x, Weights(w13.to(dtype), w2.to(dtype), *scales), scores.softmax(dim=-1), ids.int()


def fastest(
    runs: Iterator[tuple[Product, Callable[[], Tensor]]], expected: Tensor, clock: Clock
) -> tuple[float, Product] | None:
    """The product that takes the least time of those that run and give the expected result, with its time."""
    found: list[tuple[float, Product]] = []
    for product, run in runs:
        try:
            torch.testing.assert_close(run(), expected, rtol=2**-6, atol=2**-6 * float(expected.abs().max()))
            found.append((clock(run), product))
        except (AssertionError, triton.OutOfResources, triton.CompilationError) as reason:
            print(f"  left out: {product}: {str(reason).splitlines()[0]}")
    return min(found, default=None)


def tune(shape: Shape, tokens: int, device: str, clock: Clock) -> Configuration:
    """The fastest configuration for so many tokens."""
    x, weights, topk_weights, topk_ids = random_call(shape, tokens, device)
    target, fp8 = current_target(), weights.w13_scale is not None

    def call(config: Configuration) -> Call:
        return Call(x, weights, None, topk_weights, topk_ids, config, target)

    def operands(values: Tensor) -> tuple[Tensor, ...]:
        return quantize(values, decode=False) if fp8 else (values,)

    def measured(rows: int) -> tuple[float, Configuration] | None:
        # The rule's products with other rows: their result is the same, whatever time they take.
        base = rule(shape, None, target)._replace(rows=rows)
        hidden = operands(x)
        middle = call(base).up(*hidden)
        given = operands(middle)
        first, second = both(shape, rows)
        ups = ((up, partial(call(base._replace(up=up)).up, *hidden)) for up in first)
        downs = ((down, partial(call(base._replace(down=down)).down, *given)) for down in second)
        up, down = fastest(ups, middle, clock), fastest(downs, call(base).down(*given), clock)
        if up is None or down is None:
            return None
        config = Configuration(rows, up[1], down[1])
        # With it the sorting: fewer rows are more blocks.
        total = up[0] + down[0] + clock(partial(call, config))
        print(f"{shape} {tokens} tokens: {total * 1000:.1f} µs with {config}")
        return total, config

    found = [result for rows in rows_of(shape, tokens) if (result := measured(rows)) is not None]
    if not found:
        raise SystemExit(f"tune_experts: no candidate runs for {shape}")
    return min(found)[1]


def counts_of(shape: Shape, tokens: Iterable[int], measured: Container[int], target: Target) -> list[int]:
    """The numbers of tokens that have blocks and have not been measured."""
    return [count for count in tokens if count not in measured and not few(shape, count, target)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4,8")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192,16384,65536")
    parser.add_argument("--weights", default="bfloat16,float8_e4m3fn")
    parser.add_argument("--directory", type=Path, default=TUNED, help="where the file goes")
    parser.add_argument("--missing", action="store_true", help="measure only what the file does not have")
    parser.add_argument("--within", type=float, default=float("inf"), metavar="SECONDS", help="then begin nothing more")
    arguments = parser.parse_args()
    began = time.monotonic()
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU")
    file = file_of(torch.cuda.get_device_name(), arguments.directory)
    found, target = dict(load(file)), current_target()
    for ranks, weights in itertools.product(map(int, arguments.ranks.split(",")), arguments.weights.split(",")):
        shape = Shape(EXPERTS, HIDDEN, MIDDLE // ranks, TOP_K, weights)
        measured = found.get(shape, {}) if arguments.missing else {}
        counts = counts_of(shape, map(int, arguments.tokens.split(",")), measured, target)
        if not counts or time.monotonic() - began >= arguments.within:
            continue
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            for rows in sorted({rows for tokens in counts for rows in rows_of(shape, tokens)}):
                for is_up, products in zip((True, False), both(shape, rows), strict=True):
                    for product in products:
                        pool.submit(compile_product, shape, rows, product, is_up=is_up)
        for tokens in counts:
            if time.monotonic() - began >= arguments.within:
                break
            best = tune(shape, tokens, "cuda", lambda run: triton.testing.do_bench(run, return_mode="median"))
            found[shape] = found.get(shape, {}) | {tokens: best}
            save(file, triton.__version__, found)
    print(f"written: {file}")


if __name__ == "__main__":
    main()
