"""Split, QK-norm and partial RoPE: one launch from the projection to the query, key, value and gate."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.triton_elementwise import inverse_rms
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_overlap import overlapping_here, wait_for_launch_in_front
from qnext_kernels.triton_support import aligned_rows, ceil_div, power_of_two, row_tile, rows, vector_of, vector_rows

ELEMENTS = 2048
"""Of a program: two vectors of 16 bytes a thread, which are fastest for 8192 tokens on an H200."""


@triton.jit
def copy_heads(source, target, live, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy a head of each token from pointers ``source`` to pointers ``target``, both [ROWS]."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = live[:, None] & (column < HEAD_DIM)
    tl.store(target[:, None] + column, tl.load(source[:, None] + column, mask=inside), mask=inside)


@triton.jit
def norm_rope_heads(  # type: ignore[no-untyped-def]
    source, weight, target, live, position, cos_sin, cos_sin_row, known_positions, eps,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Zero-centred RMSNorm of a head of each token, then RoPE on its first 2 · HALF dimensions."""
    column = tl.arange(0, BLOCK)
    inside = live[:, None] & (column[None, :] < HEAD_DIM)
    w = 1.0 + tl.load(weight + column, mask=column < HEAD_DIM, other=0.0).to(tl.float32)
    x = tl.load(source[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = inverse_rms(x, eps, HEAD_DIM)
    normed = (x * scale * w[None, :]).to(target.dtype.element_ty)
    tl.store(target[:, None] + column[None, :], normed, mask=inside & (column[None, :] >= 2 * HALF))

    if HALF > 0:
        # The dimensions that RoPE pairs lie HALF apart: both are loaded once more, next to each other this time.
        lane = tl.arange(0, BLOCK_HALF)
        inside = live[:, None] & (lane[None, :] < HALF)
        first_w = 1.0 + tl.load(weight + lane, mask=lane < HALF, other=0.0).to(tl.float32)
        second_w = 1.0 + tl.load(weight + HALF + lane, mask=lane < HALF, other=0.0).to(tl.float32)
        first = tl.load(source[:, None] + lane[None, :], mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source[:, None] + HALF + lane[None, :], mask=inside, other=0.0).to(tl.float32)
        first, second = first * scale * first_w[None, :], second * scale * second_w[None, :]

        known = inside & ((position >= 0) & (position < known_positions))[:, None]
        table = cos_sin + (position * cos_sin_row)[:, None] + lane[None, :]
        cos = tl.load(table, mask=known, other=0.0).to(tl.float32)
        sin = tl.load(table + HALF, mask=known, other=0.0).to(tl.float32)
        turned = target[:, None] + lane[None, :]
        tl.store(turned, (first * cos - second * sin).to(target.dtype.element_ty), mask=inside)
        tl.store(turned + HALF, (second * cos + first * sin).to(target.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["qkv_token", "cos_sin_row", "known_positions", "tokens"],
    do_not_specialize_on_alignment=["positions"],
)
def qk_norm_rope_gate_kernel(  # type: ignore[no-untyped-def]
    qkv, positions, q_weight, k_weight, cos_sin, q, k, v, gate, qkv_token, cos_sin_row, known_positions, tokens, eps,
    H: tl.constexpr, KV: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One head of ROWS tokens: a query or key is normalised and rotated, a gate or value copied.

    Grid: ceil(T / ROWS) · (2 H + 2 KV), the heads of one token next to each other. Bytes: qkv read and as many
    written; the dimensions that RoPE turns are read again, from a cache.

    Args:
        qkv: [T, (2 H + 2 KV) · HEAD_DIM], a token ``qkv_token`` vectors of VECTOR elements from the next.
        positions: contiguous [T]; behind one that the table does not have, the dimensions that RoPE turns are zero.
        q_weight, k_weight: contiguous [HEAD_DIM].
        cos_sin: [known_positions, 2 · HALF], a row ``cos_sin_row`` elements from the next.
        q, gate: contiguous [T, H · HEAD_DIM]; k, v: contiguous [T, KV · HEAD_DIM].
    """
    HEADS: tl.constexpr = 2 * H + 2 * KV
    head = tl.program_id(0) % HEADS
    token = tl.program_id(0) // HEADS * ROWS + tl.arange(0, ROWS)
    live = token < tokens
    token = token.to(tl.int64)
    source = qkv + token * qkv_token * VECTOR + head * HEAD_DIM
    of_query = (token * H + head // 2) * HEAD_DIM
    of_key = (token * KV + (head - 2 * H) % KV) * HEAD_DIM
    wait_for_launch_in_front(OVERLAPS)
    position = tl.load(positions + token, mask=live, other=-1).to(tl.int64)
    if head >= 2 * H + KV:
        copy_heads(source, v + of_key, live, HEAD_DIM, BLOCK)
    elif head >= 2 * H:
        norm_rope_heads(
            source, k_weight, k + of_key, live, position, cos_sin, cos_sin_row, known_positions, eps,
            HEAD_DIM, HALF, BLOCK, BLOCK_HALF,
        )  # fmt: skip
    elif head % 2 == 1:
        copy_heads(source, gate + of_query, live, HEAD_DIM, BLOCK)
    else:
        norm_rope_heads(
            source, q_weight, q + of_query, live, position, cos_sin, cos_sin_row, known_positions, eps,
            HEAD_DIM, HALF, BLOCK, BLOCK_HALF,
        )  # fmt: skip


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
    vector, config = vector_of(head_dim, qkv.dtype), row_tile(head_dim, ELEMENTS)
    config = config | {"num_warps": max(1, config["num_warps"] // 2)}
    qkv, _, token_stride = vector_rows(qkv, vector)
    cos_sin = rows(cos_sin)
    launch(
        qk_norm_rope_gate_kernel, (ceil_div(tokens, config["ROWS"]) * 2 * (heads + kv_heads),),
        qkv, positions.contiguous(), aligned_rows(q_weight), aligned_rows(k_weight), cos_sin, *results,
        token_stride, cos_sin.stride(0), cos_sin.shape[0], tokens, eps,
        H=heads, KV=kv_heads, HEAD_DIM=head_dim, HALF=half, VECTOR=vector, BLOCK_HALF=power_of_two(half),
        enable_fp_fusion=False, **config, **overlapping_here(),
    )  # fmt: skip
