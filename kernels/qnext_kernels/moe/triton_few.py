"""The experts of a few tokens in two launches, without matrix instructions: every choice reads its expert's weights.

A program of the first product takes one choice of a token and some columns of the middle size, one of the second all
choices of a token and some columns of the result, so that nothing is sorted and their sum needs no launch. All that a
program reads of the weights is under way at once. Two choices of the same expert both read it; of few there are few.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.fp8 import FP8_GROUP
from qnext_kernels.moe.configurations import Few
from qnext_kernels.moe.triton_experts import (
    Shared,
    Weights,
    aligned,
    e4m3_value,
    of_expert,
    or_other,
    quantized_rows,
    shared_strength,
    silu_times,
)
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_overlap import overlapping, wait_for_launch_in_front
from qnext_kernels.triton_support import Target, ceil_div, power_of_two


@triton.jit
def float32_of(weights, DECODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights as they are multiplied; DECODE: they are uint8 with the bits of e4m3."""
    if DECODE:
        weights = e4m3_value(weights)
    return weights.to(tl.float32)


@triton.jit
def factors_of(  # type: ignore[no-untyped-def]
    values, scales, SIZE: tl.constexpr, GROUP: tl.constexpr, DECODE: tl.constexpr
):
    """[SIZE] activations, rounded as :func:`quantized_rows` rounds groups of them, times both their scales."""
    rounded, own = quantized_rows(tl.reshape(values, [SIZE // GROUP, GROUP]), DECODE)
    return tl.reshape(rounded.to(tl.float32) * (own * scales)[:, None], [SIZE])


@triton.jit(do_not_specialize=["tokens"])
def few_up_kernel(  # type: ignore[no-untyped-def]
    x, w13, w13_scale, shared_w13, shared_w13_scale, ids, middle,
    x_token, w13_expert, scale_expert, tokens,
    D: tl.constexpr, MIDDLE: tl.constexpr, SHARED_MIDDLE: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, DECODE: tl.constexpr, ALIGNED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """middle = SiLU(gate x) · up x for one choice of a token and COLUMNS of the middle size, rounded once.

    Grid: tokens · (TOP_K, one more with a shared expert) · ceil(max(MIDDLE, SHARED_MIDDLE) / COLUMNS). A choice of no
    expert ends at once. Bytes: 2 COLUMNS · D weights and D activations. Operations: 4 COLUMNS · D.

    Args:
        middle: [tokens · TOP_K + tokens, max(MIDDLE, SHARED_MIDDLE)], written: the rows of choices, then those of the
            shared expert by token; zeros behind the narrower of both.
        BLOCK_D: power of two ≥ D, and ≥ GROUP.

    The other arguments are those of :func:`qnext_kernels.moe.triton_experts.up_kernel`.
    """
    WIDTH: tl.constexpr = max(MIDDLE, SHARED_MIDDLE)
    TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    CHOICES: tl.constexpr = TOP_K + 1 if SHARED_MIDDLE > 0 else TOP_K
    tile = tl.program_id(0) % TILES
    token = tl.program_id(0) // TILES // CHOICES
    choice = tl.program_id(0) // TILES % CHOICES
    is_shared = choice == TOP_K
    wait_for_launch_in_front(OVERLAPS)
    expert = tl.load(ids + token * TOP_K + choice, mask=choice < TOP_K, other=-1).to(tl.int32)
    if ((expert < 0) | (expert >= E)) & (choice < TOP_K):
        return
    expert = tl.where(is_shared, E, expert)
    size = tl.where(is_shared, SHARED_MIDDLE, MIDDLE) if SHARED_MIDDLE > 0 else MIDDLE
    w = of_expert(w13, w13_expert, shared_w13, expert, E, SHARED_MIDDLE, ALIGNED)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    index = tl.arange(0, BLOCK_D)
    at = columns[:, None] * D + index[None, :]
    inside = (columns[:, None] < size) & (index[None, :] < D)
    gate_weights = tl.load(w + at, mask=inside, other=0 if DECODE else 0.0)
    up_weights = tl.load(w + size * D + at, mask=inside, other=0 if DECODE else 0.0)
    values = tl.load(x + token.to(tl.int64) * x_token + index, mask=index < D, other=0.0)
    if GROUP > 0:
        GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
        group = tl.arange(0, BLOCK_D // GROUP)
        scale = of_expert(w13_scale, scale_expert, shared_w13_scale, expert, E, SHARED_MIDDLE, False)
        scale += tl.minimum(tile * COLUMNS, size - 1) // GROUP * GROUPS + group
        gate_scales = tl.load(scale, mask=group < GROUPS, other=0.0)
        up_scales = tl.load(scale + (size + GROUP - 1) // GROUP * GROUPS, mask=group < GROUPS, other=0.0)
        for_gate = factors_of(values, gate_scales, BLOCK_D, GROUP, DECODE)
        for_up = factors_of(values, up_scales, BLOCK_D, GROUP, DECODE)
    else:
        for_gate = values.to(tl.float32)
        for_up = for_gate
    gate = tl.sum(float32_of(gate_weights, DECODE) * for_gate[None, :], axis=1)
    up = tl.sum(float32_of(up_weights, DECODE) * for_up[None, :], axis=1)
    activated = silu_times(gate, up)
    row = tl.where(is_shared, tokens * TOP_K + token, token * TOP_K + choice)
    tl.store(middle + row * WIDTH + columns, activated.to(middle.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def down_rows(  # type: ignore[no-untyped-def]
    middle, w2, w2_scale, rows, chosen, w2_start, scale_start, first, WIDTH: tl.constexpr, D: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    DECODE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS]: each row of ``middle`` times COLUMNS rows of its expert's w2, from ``first``; 0 if not chosen.

    Args:
        rows, chosen, w2_start, scale_start: [ROWS], of ``middle``, of its expert's weights and of their scales.
        SIZE: elements of the sum, at most BLOCK.
    """
    columns = first + tl.arange(0, COLUMNS)
    index = tl.arange(0, BLOCK)
    at = w2_start[:, None, None] + columns[None, :, None] * SIZE + index[None, None, :]
    inside = chosen[:, None, None] & (columns < D)[None, :, None] & (index < SIZE)[None, None, :]
    weights = tl.load(w2 + at, mask=inside, other=0 if DECODE else 0.0)
    wait_for_launch_in_front(OVERLAPS)
    here = chosen[:, None] & (index < SIZE)[None, :]
    values = tl.load(middle + rows[:, None] * WIDTH + index[None, :], mask=here, other=0.0)
    if GROUP > 0:
        GROUPS: tl.constexpr = (SIZE + GROUP - 1) // GROUP
        group = tl.arange(0, BLOCK // GROUP)
        place = w2_scale + scale_start[:, None] + first // GROUP * GROUPS + group[None, :]
        scales = tl.load(place, mask=chosen[:, None] & (group < GROUPS)[None, :], other=0.0)
        scales = tl.reshape(scales, [ROWS * (BLOCK // GROUP)])
        flat = factors_of(tl.reshape(values, [ROWS * BLOCK]), scales, ROWS * BLOCK, GROUP, DECODE)
        factors = tl.reshape(flat, [ROWS, BLOCK])
    else:
        factors = values.to(tl.float32)
    return tl.sum(float32_of(weights, DECODE) * factors[:, None, :], axis=2)


@triton.jit(do_not_specialize=["tokens"])
def few_down_kernel(  # type: ignore[no-untyped-def]
    middle, w2, w2_scale, shared_w2, shared_w2_scale, weights, ids, x, gate, out,
    x_token, w2_expert, scale_expert, tokens,
    D: tl.constexpr, MIDDLE: tl.constexpr, SHARED_MIDDLE: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr,
    CHOICES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SHARED_BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, GROUP: tl.constexpr, DECODE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """out = Σ_j weights_j · (down_j · middle_j), then that of the shared expert, for a token and COLUMNS of its result.

    Every expert's result is rounded to the dtype of ``out`` before it is weighted, as where it has a launch of its own.

    Grid: tokens · ceil(D / COLUMNS). Bytes: TOP_K · COLUMNS · MIDDLE weights and TOP_K · MIDDLE activations.
    Operations: 2 TOP_K · COLUMNS · MIDDLE.

    Args:
        middle: of :func:`few_up_kernel`.
        CHOICES: power of two ≥ TOP_K. BLOCK ≥ MIDDLE, SHARED_BLOCK ≥ SHARED_MIDDLE and BLOCK_D ≥ D: powers of two, the
            first two ≥ GROUP.

    The other arguments are those of :func:`qnext_kernels.moe.triton_experts.down_kernel` and ``sum_kernel``.
    """
    WIDTH: tl.constexpr = max(MIDDLE, SHARED_MIDDLE)
    TILES: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    token = tl.program_id(0) // TILES
    first = tl.program_id(0) % TILES * COLUMNS
    choice = tl.arange(0, CHOICES)
    pair = token * TOP_K + choice
    expert = tl.load(ids + pair, mask=choice < TOP_K, other=-1).to(tl.int64)
    chosen = (expert >= 0) & (expert < E)
    expert = tl.where(chosen, expert, 0)
    results = down_rows(
        middle, w2, w2_scale, pair, chosen, expert * w2_expert, expert * scale_expert, first,
        WIDTH, D, MIDDLE, BLOCK, CHOICES, COLUMNS, GROUP, DECODE, OVERLAPS,
    )  # fmt: skip
    strengths = tl.load(weights + pair, mask=chosen, other=0.0)
    total = tl.sum(strengths[:, None] * results.to(out.dtype.element_ty).to(tl.float32), axis=0)
    if SHARED_MIDDLE > 0:
        strength = shared_strength(x + token.to(tl.int64) * x_token, gate, D, BLOCK_D)
        one = tl.arange(0, 1)
        results = down_rows(
            middle, shared_w2, shared_w2_scale, one + tokens * TOP_K + token, one == 0, one.to(tl.int64), one, first,
            WIDTH, D, SHARED_MIDDLE, SHARED_BLOCK, 1, COLUMNS, GROUP, DECODE, False,
        )  # fmt: skip
        total += strength * tl.sum(results.to(out.dtype.element_ty).to(tl.float32), axis=0)
    columns = first + tl.arange(0, COLUMNS)
    tl.store(out + token.to(tl.int64) * D + columns, total.to(out.dtype.element_ty), mask=columns < D)


def run_few(
    x: Tensor,
    routed: Weights,
    shared: Shared | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    few: Few,
    target: Target,
    *,
    decode: bool = False,
) -> Tensor:
    """Launch :func:`few_up_kernel` and :func:`few_down_kernel`.

    Args:
        x, routed, shared, topk_weights, topk_ids, target, decode: as those of
            :class:`qnext_kernels.moe.triton_experts.Call`.
    """
    tokens, top_k = topk_ids.shape
    num_experts, hidden, middle = routed.w2.shape
    own = routed if shared is None else shared.weights
    shared_middle = 0 if shared is None else own.w2.shape[1]
    width, count = max(middle, shared_middle), top_k + (shared is not None)
    group = 0 if routed.w13_scale is None else FP8_GROUP
    common: dict[str, Any] = {
        "D": hidden, "MIDDLE": middle, "SHARED_MIDDLE": shared_middle, "E": num_experts, "TOP_K": top_k,
        "BLOCK_D": max(group, power_of_two(hidden)), "GROUP": group, "DECODE": decode,
        "num_stages": 1, "enable_fp_fusion": True, **overlapping(target),
    }  # fmt: skip
    between = torch.empty(tokens * count, width, dtype=x.dtype, device=x.device)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    scale, other = or_other(routed.w13_scale, x), or_other(own.w13_scale, x)
    launch(
        few_up_kernel, (tokens * count * ceil_div(width, few.up_columns),),
        x, routed.w13, scale, own.w13, other, topk_ids, between,
        x.stride(0), routed.w13.stride(0), scale.stride(0), tokens,
        COLUMNS=few.up_columns, ALIGNED=aligned(routed.w13), num_warps=few.up_warps, **common,
    )  # fmt: skip
    scale, other = or_other(routed.w2_scale, x), or_other(own.w2_scale, x)
    launch(
        few_down_kernel, (tokens * ceil_div(hidden, few.down_columns),),
        between, routed.w2, scale, own.w2, other, topk_weights, topk_ids, x, x if shared is None else shared.gate, out,
        x.stride(0), routed.w2.stride(0), scale.stride(0), tokens,
        CHOICES=power_of_two(top_k), COLUMNS=few.down_columns, BLOCK=max(group, power_of_two(middle)),
        SHARED_BLOCK=max(group, power_of_two(shared_middle)), num_warps=few.down_warps, **common,
    )  # fmt: skip
    return out
