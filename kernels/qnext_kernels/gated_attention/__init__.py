"""What gated attention does around the attention itself: split, QK-norm, partial RoPE, output gate.

Source: transformers' ``Qwen3NextAttention``. ``q_proj`` makes, per head, the query and then its gate; query and key are
normalised per head with a zero-centred RMSNorm; RoPE (NeoX halves) turns the first ``rotary_dim`` dimensions of each
head; the attention output is multiplied by sigmoid(gate).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext_kernels.checks import expect_dtype, expect_floating, expect_indices, expect_shape
from qnext_kernels.dispatch import Call, Operation
from qnext_kernels.gated_attention.cpu import CpuBackend
from qnext_kernels.gated_attention.flashinfer import FlashInferGatedAttention
from qnext_kernels.gated_attention.native import GatedAttentionNative
from qnext_kernels.gated_attention.reference import ReferenceBackend
from qnext_kernels.gated_attention.triton import TritonGatedAttention
from qnext_kernels.layouts import once_per_layout

operation = Operation(
    "gated_attention",
    [GatedAttentionNative(), CpuBackend(), TritonGatedAttention(), FlashInferGatedAttention(), ReferenceBackend()],
)


def qk_norm_rope_gate(
    qkv: Tensor,
    positions: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split the joint projection, normalise query and key, rotate them.

    Args:
        qkv: [T, (2·num_heads + 2·num_kv_heads) · head_dim]: per query head its query and its gate, then keys, then
            values.
        positions: [T] int32 or int64.
        q_weight, k_weight: [head_dim], zero-centred.
        cos_sin: [max_position, rotary_dim]: the cosines of the rotary_dim/2 frequencies, then their sines.
        num_heads, num_kv_heads: heads in ``qkv``.
        eps: of the norms.

    Returns:
        q [T, num_heads · head_dim], k and v [T, num_kv_heads · head_dim], gate [T, num_heads · head_dim], all in the
        dtype of ``qkv``.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit.
    """
    backend = _heads_backend(qkv, positions, q_weight, k_weight, cos_sin, num_heads, num_kv_heads)
    return backend.qk_norm_rope_gate(qkv, positions, q_weight, k_weight, cos_sin, num_heads, num_kv_heads, eps)


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """x · sigmoid(gate), computed in float32 and rounded once.

    Args:
        x: [..., D], any float dtype.
        gate: [..., D] or [..., 1], any float dtype.

    Returns:
        [..., D] in the dtype of ``x``.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
    """
    return _gate_backend(x, gate).sigmoid_gate(x, gate)


@once_per_layout
def _heads_backend(
    qkv: Tensor,
    positions: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Any:
    """Check the arguments of a split; return the backend for them."""
    expect_floating("qkv", qkv)
    expect_shape("q_weight", q_weight, (None,))
    head_dim = q_weight.shape[0]
    expect_shape("qkv", qkv, (None, 2 * (num_heads + num_kv_heads) * head_dim))
    expect_shape("k_weight", k_weight, (head_dim,))
    expect_shape("cos_sin", cos_sin, (None, None))
    expect_floating("cos_sin", cos_sin)
    expect_shape("positions", positions, (qkv.shape[0],))
    expect_dtype("positions", positions, (torch.int32, torch.int64))
    if cos_sin.shape[1] > head_dim or cos_sin.shape[1] % 2:
        raise ValueError(f"cos_sin: expected an even rotary_dim of at most {head_dim}, got {cos_sin.shape[1]}")
    backend = operation.select(qkv.device, qkv.dtype, _heads_call(qkv, q_weight, k_weight, cos_sin))
    if not isinstance(backend, GatedAttentionNative):  # whose kernel checks what it reads
        expect_indices("positions", positions, 0, cos_sin.shape[0])
    return backend


def _heads_call(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos_sin: Tensor) -> Call | None:
    """Shape: head_dim and rotary_dim; dtypes: those of both weights and of the table."""
    if qkv.is_cpu:
        return None
    shape, dtypes = (q_weight.shape[0], cos_sin.shape[1]), (q_weight.dtype, k_weight.dtype, cos_sin.dtype)
    return Call("qk_norm_rope_gate", qkv.shape[0], shape, dtypes)


@once_per_layout
def _gate_backend(x: Tensor, gate: Tensor) -> Any:
    """Check the arguments of a gate; return the backend for them."""
    expect_floating("x", x)
    if gate.shape != x.shape:
        expect_shape("gate", gate, (*x.shape[:-1], 1))
    expect_floating("gate", gate)
    return operation.select(x.device, x.dtype)
