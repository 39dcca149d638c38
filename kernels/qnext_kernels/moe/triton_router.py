"""The router's choice of experts, one warp a token, and SwiGLU's middle."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.triton_elementwise import row_start, silu
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_support import ELEMENTS, ceil_div, inner_rows, power_of_two, vector_of, vector_rows


@triton.jit(do_not_specialize=["logits_row"])
def topk_softmax_kernel(  # type: ignore[no-untyped-def]
    logits, weights, ids, logits_row,
    E: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Softmax of one token's logits and its TOP_K largest, of equal ones the lower index first.

    A probability is never negative, so its bits order as an integer does, and integers of 32 bits are what a warp
    reduces in one instruction. NaN counts as zero.

    Grid: T. Bytes: E logits read and 8 · TOP_K written; 2 · TOP_K reductions over E keys.

    Args:
        logits: [T, E], a row ``logits_row`` vectors of VECTOR elements from the next.
        weights, ids: contiguous [T, TOP_K], float32 and int32.
    """
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    x = tl.load(logits + token * logits_row * VECTOR + expert, mask=expert < E, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    total = tl.sum(e, axis=0)

    key = tl.where(expert < E, tl.where(e == e, e, 0.0).to(tl.int32, bitcast=True), -1)
    place = tl.arange(0, BLOCK_K)
    largest_bits = tl.zeros([BLOCK_K], tl.int32)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    for j in tl.static_range(TOP_K):
        largest = tl.max(key, axis=0)
        first = tl.min(tl.where(key == largest, expert, BLOCK_E), axis=0)
        largest_bits = tl.where(place == j, largest, largest_bits)
        chosen = tl.where(place == j, first, chosen)
        key = tl.where(expert == first, -1, key)

    weight = tl.div_rn(largest_bits.to(tl.float32, bitcast=True), total)
    if RENORMALIZE:
        weight = tl.div_rn(weight, tl.sum(tl.where(place < TOP_K, weight, 0.0), axis=0))
    at = token * TOP_K + place
    tl.store(weights + at, weight, mask=place < TOP_K)
    tl.store(ids + at, chosen, mask=place < TOP_K)


@triton.jit(do_not_specialize=["x_outer", "x_inner", "inner", "rows"])
def silu_and_mul_kernel(  # type: ignore[no-untyped-def]
    x, out, x_outer, x_inner, inner, rows,
    WIDTH: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
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
    gate_at = row_start(row, inner, x_outer, x_inner)[:, None] * VECTOR + column[None, :]
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
        num_warps=4, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
