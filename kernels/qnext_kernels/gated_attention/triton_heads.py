"""Split, QK-norm and partial RoPE: one launch from the projection to the query, key, value and gate."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.triton_elementwise import inverse_rms
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_overlap import overlapping_here, wait_for_launch_in_front
from qnext_kernels.triton_support import aligned_rows, ceil_div, power_of_two, row_tile, vector_of, vector_rows

TOKENS = 8
"""Of a program, which has a warp for each."""


@triton.jit
def load_either(one, other, of_one, at, mask):  # type: ignore[no-untyped-def]
    """Float32 of either pointer, which may have different dtypes."""
    if of_one:
        found = tl.load(one + at, mask=mask, other=0.0).to(tl.float32)
    else:
        found = tl.load(other + at, mask=mask, other=0.0).to(tl.float32)
    return found


@triton.jit
def norm_rope_heads(  # type: ignore[no-untyped-def]
    source, q_weight, k_weight, queries, live, position, cos_sin, cos_sin_row, known_positions, eps,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, TABLE_VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Zero-centred RMSNorm of a head of each token, then RoPE on its first 2 · HALF dimensions; float32 [ROWS, BLOCK].

    Of a dimension that RoPE turns, a thread also loads the other one of the pair: what a thread has stays with it.
    """
    column = tl.arange(0, BLOCK)[None, :]
    # A weight a row, for the same reason.
    rows = tl.zeros_like(live).to(tl.int32)[:, None]
    inside = live[:, None] & (column < HEAD_DIM)
    x = tl.load(source[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    w = 1.0 + load_either(q_weight, k_weight, queries, rows + column, inside)
    if HALF > 0:
        first, turned = column < HALF, inside & (column < 2 * HALF)
        lane = vectors(tl.where(first, column, column - HALF), HALF & -HALF)
        pair = vectors(rows + tl.where(first, column + HALF, column - HALF), HALF & -HALF)
        other = tl.load(source[:, None] + pair, mask=turned, other=0.0).to(tl.float32)
        other_w = 1.0 + load_either(q_weight, k_weight, queries, pair, turned)
        known = turned & ((position >= 0) & (position < known_positions))[:, None]
        table = cos_sin + (position * cos_sin_row * TABLE_VECTOR)[:, None] + lane
        cos = tl.load(table, mask=known, other=0.0).to(tl.float32)
        sin = tl.load(table + HALF, mask=known, other=0.0).to(tl.float32)
    scale = inverse_rms(x, eps, HEAD_DIM)
    normed = x * scale * w
    if HALF > 0:
        across = other * scale * other_w * sin
        normed = tl.where(column < 2 * HALF, normed * cos + tl.where(first, -across, across), normed)
    return normed


@triton.jit
def vectors(columns, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """``columns`` [ROWS, BLOCK], of which VECTOR neighbours are consecutive and begin at a multiple of VECTOR."""
    return tl.max_contiguous(tl.multiple_of(columns, [1, VECTOR]), [1, VECTOR])


@triton.jit(
    do_not_specialize=["qkv_token", "cos_sin_row", "known_positions", "tokens"],
    do_not_specialize_on_alignment=["positions"],
)
def qk_norm_rope_gate_kernel(  # type: ignore[no-untyped-def]
    qkv, positions, q_weight, k_weight, cos_sin, q, k, v, gate, qkv_token, cos_sin_row, known_positions, tokens, eps,
    H: tl.constexpr, KV: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, VECTOR: tl.constexpr,
    TABLE_VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One head of ROWS tokens: a query or key is normalised and rotated, a gate or value copied.

    Grid: ceil(T / ROWS) · (2 H + 2 KV), the heads of one token next to each other. Bytes: qkv read and as many
    written; the dimensions that RoPE turns are read again, from a cache.

    Args:
        qkv: [T, (2 H + 2 KV) · HEAD_DIM], a token ``qkv_token`` vectors of VECTOR elements from the next.
        positions: contiguous [T]; behind one that the table does not have, the dimensions that RoPE turns are zero.
        q_weight, k_weight: contiguous [HEAD_DIM].
        cos_sin: [known_positions, 2 · HALF], a row ``cos_sin_row`` vectors of TABLE_VECTOR elements from the next.
        q, gate: contiguous [T, H · HEAD_DIM]; k, v: contiguous [T, KV · HEAD_DIM].
    """
    HEADS: tl.constexpr = 2 * H + 2 * KV
    head = tl.program_id(0) % HEADS
    token = tl.program_id(0) // HEADS * ROWS + tl.arange(0, ROWS)
    live = token < tokens
    token = token.to(tl.int64)
    source = qkv + token * qkv_token * VECTOR + head * HEAD_DIM
    queries = head < 2 * H
    of_result = (token * tl.where(queries, H, KV) + tl.where(queries, head // 2, (head - 2 * H) % KV)) * HEAD_DIM
    wait_for_launch_in_front(OVERLAPS)
    if (head >= 2 * H + KV) | (queries & (head % 2 == 1)):
        column = tl.arange(0, BLOCK)[None, :]
        inside = live[:, None] & (column < HEAD_DIM)
        target = tl.where(queries, gate, v) + of_result
        tl.store(target[:, None] + column, tl.load(source[:, None] + column, mask=inside), mask=inside)
    else:
        position = tl.load(positions + token, mask=live, other=-1).to(tl.int64)
        target = tl.where(queries, q, k) + of_result
        normed = norm_rope_heads(
            source, q_weight, k_weight, queries, live, position, cos_sin, cos_sin_row, known_positions, eps,
            HEAD_DIM, HALF, TABLE_VECTOR, BLOCK,
        )  # fmt: skip
        column = tl.arange(0, BLOCK)[None, :]
        inside = live[:, None] & (column < HEAD_DIM)
        tl.store(target[:, None] + column, normed.to(q.dtype.element_ty), mask=inside)


def run_qk_norm_rope_gate(
    qkv: Tensor,
    positions: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    eps: float,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Launch :func:`qk_norm_rope_gate_kernel`; the results q, k, v and gate, all contiguous, are written."""
    tokens, head_dim, half = qkv.shape[0], q_weight.shape[0], cos_sin.shape[1] // 2
    heads, kv_heads = (result.shape[1] // head_dim for result in results[:2])
    if qkv.numel() == 0:
        return
    vector, config = vector_of(head_dim, qkv.dtype), row_tile(head_dim, TOKENS * power_of_two(head_dim))
    qkv, _, token_stride = vector_rows(qkv, vector)
    table_vector = vector_of(half, cos_sin.dtype)
    cos_sin, _, table_stride = vector_rows(cos_sin, table_vector)
    launch(
        qk_norm_rope_gate_kernel, (ceil_div(tokens, config["ROWS"]) * 2 * (heads + kv_heads),),
        qkv, positions.contiguous(), aligned_rows(q_weight), aligned_rows(k_weight), cos_sin, *results,
        token_stride, table_stride, cos_sin.shape[0], tokens, eps,
        H=heads, KV=kv_heads, HEAD_DIM=head_dim, HALF=half, VECTOR=vector, TABLE_VECTOR=table_vector,
        enable_fp_fusion=False, **config, **overlapping_here(),
    )  # fmt: skip
