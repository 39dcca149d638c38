"""Which rows each program of the experts' products takes: (token, choice) pairs sorted by expert, in blocks of rows.

A counting sort, stable in the order of the pairs, in one launch for few pairs and in two for many. All of it is
integers, every place is written by one program, and nothing depends on the order of programs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.triton_support import power_of_two

STEP = 128
"""Pairs that a program ranks at once, each against each."""
ONE_PROGRAM = 4 * STEP
"""So many pairs are sorted by one program, faster than a second launch begins."""
MOST_PROGRAMS = 256
"""Every program reads the counts of all."""


class Blocks(NamedTuple):
    """Blocks of at most ``rows`` pairs of one expert, by expert, and by number of the pair within one."""

    order: Tensor
    """[P] int32: the pair, token · top_k + choice, at each place of the sorted order."""
    table: Tensor
    """[3, blocks] int32: the expert of a block, the place of its first pair and the place behind its last.

    Behind the last block the expert is −1.
    """
    rows: int


@triton.jit
def valid_ids(ids, pair, end, E: tl.constexpr):  # type: ignore[no-untyped-def]
    """The experts of pairs before ``end``, 0 in place of one that does not exist, and which do exist."""
    expert = tl.load(ids + pair, mask=pair < end, other=-1).to(tl.int32)
    valid = (expert >= 0) & (expert < E)
    return tl.where(valid, expert, 0), valid


@triton.jit
def count(ids, begin, end, E: tl.constexpr, BINS: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many pairs in [begin, end) chose each expert, [BINS] int32."""
    counts = tl.zeros([BINS], tl.int32)
    for first in range(begin, end, STEP):
        expert, valid = valid_ids(ids, first + tl.arange(0, STEP), end, E)
        counts += tl.histogram(expert, BINS, mask=valid)
    return counts


@triton.jit(do_not_specialize=["pairs", "share"])
def count_kernel(  # type: ignore[no-untyped-def]
    ids, counts, pairs, share, E: tl.constexpr, BINS: tl.constexpr, STEP: tl.constexpr
):
    """Count the choices of a share of the pairs.

    Grid: ceil(pairs / share). Bytes: ids once, 4 BINS written by each program.

    Args:
        ids: [pairs], −1 where no expert of this rank was chosen.
        counts: [programs, BINS] int32, written.
        share: pairs of a program.
    """
    program = tl.program_id(0)
    begin = program * share
    here = count(ids, begin, tl.minimum(begin + share, pairs), E, BINS, STEP)
    tl.store(counts + program * BINS + tl.arange(0, BINS), here)


@triton.jit(do_not_specialize=["pairs", "share", "programs", "most_blocks"])
def align_kernel(  # type: ignore[no-untyped-def]
    ids, counts, order, table, pairs, share, programs, most_blocks,
    E: tl.constexpr, BINS: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Give every pair its place and every block its expert.

    Grid: ``programs``. The places of a share of the pairs begin, expert by expert, behind those of the shares before;
    within it a pair is ranked among the STEP pairs around it by comparing each with each. Bytes: ids once, all counts
    by every program (from the L2 cache), and what is written.

    Args:
        ids: [pairs]; counts: [programs, BINS] of :func:`count_kernel`, not read where one program does everything.
        order, table: of :class:`Blocks`, written.
        most_blocks: columns of ``table``.
        PART: rows of ``counts`` that are read at once.
    """
    program = tl.program_id(0)
    begin = program * share
    end = tl.minimum(begin + share, pairs)
    bins = tl.arange(0, BINS)
    before = tl.zeros([BINS], tl.int32)
    if PART == 0:
        total = count(ids, begin, end, E, BINS, STEP)
    else:
        total = tl.zeros([BINS], tl.int32)
        for first in range(0, programs, PART):
            other = first + tl.arange(0, PART)
            rows = tl.load(counts + other[:, None] * BINS + bins[None, :], mask=other[:, None] < programs, other=0)
            total += tl.sum(rows, axis=0)
            before += tl.sum(tl.where(other[:, None] < program, rows, 0), axis=0)

    blocks = (total + ROWS - 1) // ROWS
    last_block = tl.cumsum(blocks, axis=0)
    start = tl.cumsum(total, axis=0) - total
    for number in range(program, tl.max(blocks, axis=0), programs):
        place = table + last_block - blocks + number
        first_row = start + number * ROWS
        inside = number < blocks
        tl.store(place, bins, mask=inside)
        tl.store(place + most_blocks, first_row, mask=inside)
        tl.store(place + 2 * most_blocks, tl.minimum(first_row + ROWS, start + total), mask=inside)
    for first in range(tl.sum(blocks, axis=0) + program * BINS, most_blocks, programs * BINS):
        tl.store(table + first + bins, tl.full([BINS], -1, tl.int32), mask=first + bins < most_blocks)

    free = start + before
    index = tl.arange(0, STEP)
    for first in range(begin, end, STEP):
        expert, valid = valid_ids(ids, first + index, end, E)
        same = (expert[:, None] == expert[None, :]) & valid[None, :] & (index[:, None] > index[None, :])
        place = tl.gather(free, expert, 0) + tl.sum(same.to(tl.int32), axis=1)
        tl.store(order + place, first + index, mask=valid)
        free += tl.histogram(expert, BINS, mask=valid)


def most_blocks(pairs: int, num_experts: int, rows: int) -> int:
    """The most blocks of ``rows`` that so many pairs make, however they choose."""
    partly_filled = min(pairs, num_experts)
    return partly_filled + (pairs - partly_filled) // rows


def align(topk_ids: Tensor, num_experts: int, rows: int) -> Blocks:
    """Sort the choices of all tokens by expert, in blocks.

    Args:
        topk_ids: contiguous [T, top_k] int32 or int64; what is not within [0, num_experts) is left out.
        num_experts: E.
        rows: the most pairs of a block.

    Returns:
        The blocks; ``order`` is undefined behind the last pair that is not left out.
    """
    pairs = topk_ids.numel()
    device = topk_ids.device
    step = min(STEP, max(16, power_of_two(pairs)))
    programs = 1 if pairs <= ONE_PROGRAM else min(MOST_PROGRAMS, triton.cdiv(pairs, STEP))
    share = triton.cdiv(triton.cdiv(pairs, programs), step) * step
    programs = triton.cdiv(pairs, share)
    bins = max(32, power_of_two(num_experts))
    order = torch.empty(pairs, dtype=torch.int32, device=device)
    table = torch.empty(3, most_blocks(pairs, num_experts, rows), dtype=torch.int32, device=device)
    part = 0 if programs == 1 else min(16, power_of_two(programs))
    warps = max(1, min(8, bins // 64))
    counts = order
    if part:
        counts = torch.empty(programs, bins, dtype=torch.int32, device=device)
        count_kernel[(programs,)](
            topk_ids, counts, pairs, share, E=num_experts, BINS=bins, STEP=step, num_warps=4, enable_fp_fusion=True
        )
    align_kernel[(programs,)](
        topk_ids, counts, order, table, pairs, share, programs, table.shape[1],
        E=num_experts, BINS=bins, STEP=step, PART=part, ROWS=rows, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return Blocks(order, table, rows)
