"""QK-norm and partial RoPE in FlashInfer: ``gemma_rmsnorm`` and ``apply_rope_with_cos_sin_cache_inplace``."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import Call
from qnext_kernels.flashinfer_support import FlashInferBackend
from qnext_kernels.operators import operator
from qnext_kernels.triton_support import aligned_rows

HEAD_DIMS = (64, 128, 256)
"""That the RoPE kernel is instantiated for."""


class FlashInferGatedAttention(FlashInferBackend):
    """Four launches: a norm for queries and one for keys, the rotation, a copy of the gates.

    Queries and keys are rounded between norm and rotation, as in transformers; our own backends round once.
    """

    def supports_call(self, device: torch.device, dtype: torch.dtype, call: Call) -> str | None:
        if call.method != "qk_norm_rope_gate":
            return f"has no {call.method}"
        _, _, head_dim, rotary_dim = call.shape
        q_dtype, k_dtype, table_dtype = call.dtypes
        if head_dim not in HEAD_DIMS or rotary_dim % 16:
            return f"rotates a multiple of 16 of {HEAD_DIMS} dimensions, got {rotary_dim} of {head_dim}"
        if (q_dtype, k_dtype) != (dtype, dtype):
            return f"needs weights in {dtype}, got {q_dtype} and {k_dtype}"
        return None if table_dtype == torch.float32 else f"needs cos_sin in torch.float32, got {table_dtype}"

    def qk_norm_rope_gate(
        self,
        qkv: Tensor,
        positions: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos_sin: Tensor,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, gate, k, v = split_heads(qkv, q_weight.shape[0], num_heads, num_kv_heads)
        q, k = flashinfer_qk_norm_rope(q, k, positions, q_weight, k_weight, cos_sin, eps)
        return q, k, v.flatten(1), gate.flatten(1)


def split_heads(qkv: Tensor, head_dim: int, num_heads: int, num_kv_heads: int) -> tuple[Tensor, ...]:
    """q, gate [T, num_heads, head_dim], k and v [T, num_kv_heads, head_dim]: views of the joint projection."""
    heads = qkv.unflatten(1, (2 * (num_heads + num_kv_heads), head_dim))
    q_gate, k, v = heads.split([2 * num_heads, num_kv_heads, num_kv_heads], dim=1)
    return q_gate[:, 0::2], q_gate[:, 1::2], k, v


def _empty(
    q: Tensor, k: Tensor, positions: Tensor, q_weight: Tensor, k_weight: Tensor, cos_sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    tokens, _, head_dim = q.shape
    return q.new_empty(tokens, q.shape[1] * head_dim), k.new_empty(tokens, k.shape[1] * head_dim)


@operator(_empty)
def flashinfer_qk_norm_rope(
    q: Tensor, k: Tensor, positions: Tensor, q_weight: Tensor, k_weight: Tensor, cos_sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Zero-centred RMSNorm of each head, then RoPE (NeoX halves); q and k [T, heads, D] give [T, heads · D]."""
    from flashinfer.norm import gemma_rmsnorm
    from flashinfer.rope import apply_rope_with_cos_sin_cache_inplace

    head_dim = q.shape[2]
    outs = _empty(q, k, positions, q_weight, k_weight, cos_sin, eps)
    if q.shape[0]:
        with torch.cuda.device_of(q):
            for x, weight, out in zip((q, k), (q_weight, k_weight), outs, strict=True):
                heads = out.view(x.shape)
                gemma_rmsnorm(aligned_rows(x), aligned_rows(weight.contiguous()), eps, out=heads)
            apply_rope_with_cos_sin_cache_inplace(
                positions=positions.contiguous(),
                query=outs[0],
                key=outs[1],
                head_size=head_dim,
                cos_sin_cache=cos_sin.contiguous(),
                is_neox=True,
            )
    return outs
