"""The router's choice of experts, one warp a token, and SwiGLU's middle."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.triton_elementwise import outer_and_inner, silu
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_overlap import overlapping_here, wait_for_launch_in_front
from qnext_kernels.triton_support import ELEMENTS, ceil_div, inner_rows, power_of_two, vector_of, vector_rows


@triton.jit
def largest_logits(  # type: ignore[no-untyped-def]
    x, expert, dtype: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The TOP_K largest of the logits x [BLOCK_E], which came in a dtype of 16 bits, and their experts, [BLOCK_K] each.

    A logit and its expert are one integer, which no other expert has: one reduction finds both.
    """
    NOTHING: tl.constexpr = -(2**31)
    bits = tl.where(x == x, x + 0.0, -float("inf")).to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
    key = tl.where(expert < E, ascending(bits) * 65536 + (65535 - expert), NOTHING)
    place = tl.arange(0, BLOCK_K)
    keys = tl.full([BLOCK_K], NOTHING, tl.int32)
    for j in tl.static_range(TOP_K):
        largest = tl.max(key, axis=0)
        keys = tl.where(place == j, largest, keys)
        key = tl.where(key == largest, NOTHING, key)
    found = ascending(keys >> 16).to(tl.int16).to(dtype, bitcast=True)
    return found.to(tl.float32), 65535 - (keys & 65535)


@triton.jit
def ascending(bits):  # type: ignore[no-untyped-def]
    """The bits of floating-point numbers of 16 bits as integers that order as those do, and back."""
    return bits ^ ((bits >> 15) & 32767)


@triton.jit
def largest_probabilities(  # type: ignore[no-untyped-def]
    e, expert, E: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The TOP_K largest of e [BLOCK_E], which is not negative, and their experts, [BLOCK_K] each.

    Its bits order as an integer does; a second reduction finds the first expert of those that have it.
    """
    key = tl.where(expert < E, tl.where(e == e, e, 0.0).to(tl.int32, bitcast=True), -1)
    place = tl.arange(0, BLOCK_K)
    keys = tl.zeros([BLOCK_K], tl.int32)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    for j in tl.static_range(TOP_K):
        largest = tl.max(key, axis=0)
        first = tl.min(tl.where(key == largest, expert, E), axis=0)
        keys = tl.where(place == j, largest, keys)
        chosen = tl.where(place == j, first, chosen)
        key = tl.where(expert == first, -1, key)
    return keys.to(tl.float32, bitcast=True), chosen


@triton.jit(do_not_specialize=["logits_row"])
def topk_softmax_kernel(  # type: ignore[no-untyped-def]
    logits, weights, ids, logits_row,
    E: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Softmax of one token's logits and its TOP_K largest, of equal ones the lower index first; NaN counts as zero.

    Integers of 32 bits are what a warp reduces in one instruction.

    Grid: T. Bytes: E logits read and 8 · TOP_K written; TOP_K reductions over E keys, or twice as many.

    Args:
        logits: [T, E], a row ``logits_row`` vectors of VECTOR elements from the next.
        weights, ids: contiguous [T, TOP_K], float32 and int32.
    """
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    wait_for_launch_in_front(OVERLAPS)
    x = tl.load(logits + token * logits_row * VECTOR + expert, mask=expert < E, other=-float("inf")).to(tl.float32)
    highest = tl.max(x, axis=0)
    e = tl.exp(x - highest)
    if logits.dtype.element_ty.primitive_bitwidth == 16 and E < 2**16:
        logit, chosen = largest_logits(x, expert, logits.dtype.element_ty, E, TOP_K, BLOCK_K)
        largest = tl.exp(logit - highest)
    else:
        largest, chosen = largest_probabilities(e, expert, E, TOP_K, BLOCK_K)
    place = tl.arange(0, BLOCK_K)
    weight = tl.div_rn(largest, tl.sum(e, axis=0))
    if RENORMALIZE:
        weight = tl.div_rn(weight, tl.sum(tl.where(place < TOP_K, weight, 0.0), axis=0))
    at = token * TOP_K + place
    tl.store(weights + at, weight, mask=place < TOP_K)
    tl.store(ids + at, chosen, mask=place < TOP_K)


@triton.jit(do_not_specialize=["x_outer", "x_inner", "inner", "rows"])
def silu_and_mul_kernel(  # type: ignore[no-untyped-def]
    x, out, x_outer, x_inner, inner, rows,
    WIDTH: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """SiLU(gate) · up for ROWS rows and BLOCK of their columns.

    Grid: ceil(rows / ROWS) × ceil(WIDTH / BLOCK). Bytes: 2 · WIDTH elements read and WIDTH written a row.

    Args:
        x: rows of 2 · WIDTH, gate then up; the strides ``x_outer`` and ``x_inner`` count vectors of VECTOR elements.
        out: contiguous [rows, WIDTH].
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < WIDTH)
    outer, within = outer_and_inner(row, inner, rows)
    gate_at = (outer * x_outer + within * x_inner)[:, None] * VECTOR + column[None, :]
    wait_for_launch_in_front(OVERLAPS)
    gate = tl.load(x + gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + gate_at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    out_at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(out + out_at, (silu(gate) * up).to(out.dtype.element_ty), mask=inside)


def run_topk_softmax(logits: Tensor, weights: Tensor, ids: Tensor, renormalize: bool) -> None:
    """Launch :func:`topk_softmax_kernel` for logits [T, E] of any strides; weights and ids are written."""
    tokens, experts = logits.shape
    if tokens == 0:
        return
    vector = vector_of(experts, logits.dtype)
    logits, _, row = vector_rows(logits, vector)
    block, top_k = power_of_two(experts), ids.shape[1]
    launch(
        topk_softmax_kernel, (tokens,),
        logits, weights, ids, row,
        E=experts, TOP_K=top_k, RENORMALIZE=renormalize, VECTOR=vector, BLOCK_E=block, BLOCK_K=power_of_two(top_k),
        num_warps=max(1, min(16, block // 1024)), num_stages=1, enable_fp_fusion=False,
        **overlapping_here(),
    )  # fmt: skip


def run_silu_and_mul(x: Tensor, out: Tensor) -> None:
    """Launch :func:`silu_and_mul_kernel` for x [..., 2·I] of any strides; out is written."""
    width = out.shape[-1]
    if out.numel() == 0:
        return
    vector, rows = vector_of(width, x.dtype), out.numel() // width
    x, outer, inner = vector_rows(x, vector)
    block = min(ELEMENTS, power_of_two(width))
    launch(
        silu_and_mul_kernel, (ceil_div(rows, ELEMENTS // block), ceil_div(width, block)),
        x, out, outer, inner, inner_rows(x), rows,
        WIDTH=width, VECTOR=vector, ROWS=ELEMENTS // block, BLOCK=block,
        num_warps=4, num_stages=1, enable_fp_fusion=False, **overlapping_here(),
    )  # fmt: skip
