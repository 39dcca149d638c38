"""Which rows each program of the experts' products takes: (token, choice) pairs sorted by expert, in blocks of rows.

Few pairs are sorted in one launch that compares each with each, many by counting in three; both are stable in the
order of the pairs. All of it is integers, every place is written by one program, and nothing depends on the order of
programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_overlap import APART, wait_for_launch_in_front
from qnext_kernels.triton_support import ceil_div, power_of_two

STEP = 128
"""Pairs of a program, of many."""
FEW_PAIRS = 1024
"""So many are all compared with each other."""
COMPARED = 8
"""Of few pairs, those of a program."""
SCANNED = 8
"""Columns of counts that a program sums: a sector of memory."""


class Blocks(NamedTuple):
    """Blocks of at most ``rows`` pairs of one expert, by expert, and by number of the pair within one."""

    order: Tensor
    """[P] int32: the pair, token · top_k + choice, at each place of the sorted order."""
    table: Tensor
    """[3, blocks] int32: the expert of a block, the place of its first pair and the place behind its last.

    Where there is no block, between others or behind them, the expert is −1.
    """
    rows: int


@triton.jit
def valid_ids(ids, pair, end, E: tl.constexpr):  # type: ignore[no-untyped-def]
    """The experts of pairs before ``end``, 0 in place of one that does not exist, and which do exist."""
    expert = tl.load(ids + pair, mask=pair < end, other=-1).to(tl.int32)
    valid = (expert >= 0) & (expert < E)
    return tl.where(valid, expert, 0), valid


@triton.jit(do_not_specialize=["pairs"])
def compare_kernel(  # type: ignore[no-untyped-def]
    ids, order, table, pairs, E: tl.constexpr, ROWS: tl.constexpr, MINE: tl.constexpr, ALL: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Give every pair its place, and every block the column of its first pair's place.

    Grid: ceil(pairs / MINE). Bytes: ids by every program, and what is written.

    Args:
        ids: [pairs]; order: [pairs] and table: [3, pairs] of :class:`Blocks`, written.
        ALL: power of two ≥ pairs.
    """
    pair = tl.program_id(0) * MINE + tl.arange(0, MINE)
    other = tl.arange(0, ALL)
    wait_for_launch_in_front(OVERLAPS)
    expert, valid = valid_ids(ids, pair, pairs, E)
    expert = tl.where(valid, expert, E)
    others, other_valid = valid_ids(ids, other, pairs, E)
    # Pairs without an expert are behind all others, and behind them what is no pair.
    others = tl.where(other_valid, others, tl.where(other < pairs, E, E + 1))
    same = (others[None, :] == expert[:, None]).to(tl.int32)
    number = tl.sum(tl.where(other[None, :] < pair[:, None], same, 0), axis=1)
    first = tl.sum((others[None, :] < expert[:, None]).to(tl.int32), axis=1)
    end = first + tl.sum(same, axis=1)
    place = first + number
    inside = pair < pairs
    tl.store(order + place, pair, mask=inside)
    tl.store(table + place, tl.where(valid & (number % ROWS == 0), expert, -1), mask=inside)
    tl.store(table + pairs + place, place, mask=inside)
    tl.store(table + 2 * pairs + place, tl.minimum(place + ROWS, end), mask=inside)


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(  # type: ignore[no-untyped-def]
    ids, counts, pairs, E: tl.constexpr, BINS: tl.constexpr, STEP: tl.constexpr, OVERLAPS: tl.constexpr
):
    """Count the choices of STEP pairs.

    Grid: ceil(pairs / STEP). Bytes: ids once, 4 BINS written by each program.

    Args:
        ids: [pairs], −1 where no expert of this rank was chosen.
        counts: [programs, BINS] int32, written.
    """
    program = tl.program_id(0)
    wait_for_launch_in_front(OVERLAPS)
    expert, valid = valid_ids(ids, program * STEP + tl.arange(0, STEP), pairs, E)
    tl.store(counts + program * BINS + tl.arange(0, BINS), tl.histogram(expert, BINS, mask=valid))


@triton.jit(do_not_specialize=["programs"])
def scan_kernel(  # type: ignore[no-untyped-def]
    counts, programs, BINS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr, OVERLAPS: tl.constexpr
):
    """Replace the counts of each program by the sums of those before it.

    Grid: BINS / COLUMNS. Bytes: counts read and written once.

    Args:
        counts: [programs + 1, BINS] int32, the last row written only: the sums of all.
        PART: rows that are read at once.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    wait_for_launch_in_front(OVERLAPS)
    before = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, programs, PART):
        program = first + tl.arange(0, PART)
        at = counts + program[:, None] * BINS + column[None, :]
        here = tl.load(at, mask=program[:, None] < programs, other=0)
        tl.store(at, before[None, :] + tl.cumsum(here, axis=0) - here, mask=program[:, None] < programs)
        before += tl.sum(here, axis=0)
    tl.store(counts + programs * BINS + column, before)


@triton.jit(do_not_specialize=["pairs", "programs", "most_blocks"])
def align_kernel(  # type: ignore[no-untyped-def]
    ids, counts, order, table, pairs, programs, most_blocks,
    E: tl.constexpr, BINS: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Give every pair its place and every block its expert.

    Grid: ``programs``. The places of a program's pairs begin, expert by expert, behind those of the programs before;
    among themselves they are ranked by comparing each with each. Bytes: ids and counts once, and what is written.

    Args:
        ids: [pairs]; counts: of :func:`scan_kernel`.
        order, table: of :class:`Blocks`, written.
        most_blocks: columns of ``table``.
        PART: pairs that all of the program are compared with at once.
    """
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    wait_for_launch_in_front(OVERLAPS)
    total = tl.load(counts + programs * BINS + bins)
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

    pair = program * STEP + tl.arange(0, STEP)
    expert, valid = valid_ids(ids, pair, pairs, E)
    place = tl.gather(start, expert, 0) + tl.load(counts + program * BINS + expert)
    for part in tl.static_range(0, STEP, PART):
        other = program * STEP + part + tl.arange(0, PART)
        others, other_valid = valid_ids(ids, other, pairs, E)
        same = (others[None, :] == expert[:, None]) & other_valid[None, :] & (other[None, :] < pair[:, None])
        place += tl.sum(same.to(tl.int32), axis=1)
    tl.store(order + place, pair, mask=valid)


def most_blocks(pairs: int, num_experts: int, rows: int) -> int:
    """How many columns a table has: of few pairs, as many as they are, else the most blocks that they can make."""
    if pairs <= FEW_PAIRS:
        return pairs
    partly_filled = min(pairs, num_experts)
    return partly_filled + (pairs - partly_filled) // rows


def align(topk_ids: Tensor, num_experts: int, rows: int, overlap: Mapping[str, bool] = APART) -> Blocks:
    """Sort the choices of all tokens by expert, in blocks.

    Args:
        topk_ids: contiguous [T, top_k] int32 or int64; what is not within [0, num_experts) is left out.
        num_experts: E.
        rows: the most pairs of a block.
        overlap: of ``overlapping``.

    Returns:
        The blocks; ``order`` is undefined behind the last pair that is not left out.
    """
    pairs = topk_ids.numel()
    device = topk_ids.device
    order = torch.empty(pairs, dtype=torch.int32, device=device)
    table = torch.empty(3, most_blocks(pairs, num_experts, rows), dtype=torch.int32, device=device)
    options: dict[str, Any] = {"enable_fp_fusion": True, **overlap}
    if pairs <= FEW_PAIRS:
        launch(
            compare_kernel, (ceil_div(pairs, COMPARED),),
            topk_ids, order, table, pairs,
            E=num_experts, ROWS=rows, MINE=COMPARED, ALL=power_of_two(pairs), num_warps=4, **options,
        )  # fmt: skip
        return Blocks(order, table, rows)
    programs = ceil_div(pairs, STEP)
    bins = max(32, power_of_two(num_experts))
    counts = torch.empty(programs + 1, bins, dtype=torch.int32, device=device)
    launch(
        count_kernel, (programs,),
        topk_ids, counts, pairs, E=num_experts, BINS=bins, STEP=STEP, num_warps=4, **options,
    )  # fmt: skip
    launch(
        scan_kernel, (bins // SCANNED,),
        counts, programs, BINS=bins, COLUMNS=SCANNED, PART=256, num_warps=4, **options,
    )  # fmt: skip
    launch(
        align_kernel, (programs,),
        topk_ids, counts, order, table, pairs, programs, table.shape[1],
        E=num_experts, BINS=bins, STEP=STEP, PART=32, ROWS=rows, num_warps=max(4, min(8, bins // 64)), **options,
    )  # fmt: skip
    return Blocks(order, table, rows)
