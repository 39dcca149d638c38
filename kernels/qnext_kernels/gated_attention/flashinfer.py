"""QK-norm and partial RoPE in FlashInfer: ``gemma_rmsnorm``, then ``apply_rope_with_cos_sin_cache``."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import Call
from qnext_kernels.flashinfer_support import FlashInferBackend
from qnext_kernels.gated_attention.results import empty_heads
from qnext_kernels.gated_attention.triton import TritonGatedAttention
from qnext_kernels.operators import operator
from qnext_kernels.rms_norm.flashinfer import flashinfer_gemma_rmsnorm
from qnext_kernels.triton_support import aligned_rows

HEAD_DIMS = (64, 128, 256)
WHOLE = 16
"""Of the dimensions that are turned, a thread has 8 of one half."""


class FlashInferGatedAttention(FlashInferBackend, TritonGatedAttention):
    """Eight launches; queries and keys are rounded behind their norm and once more, as transformers rounds them.

    A position that the table does not have is taken for the nearest. The output gate is Triton's.
    """

    batch_invariant = False

    def supports_call(self, device: torch.device, dtype: torch.dtype, call: Call) -> str | None:
        (head_dim, rotary_dim), (q_weight, k_weight, table) = call.shape, call.dtypes
        if head_dim not in HEAD_DIMS:
            return f"needs a head dimension of {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
        if rotary_dim == 0 or rotary_dim % WHOLE:
            return f"turns dimensions by {WHOLE}, got {rotary_dim}"
        if table != torch.float32:
            return f"needs cos_sin in torch.float32, got {table}"
        for weight in (q_weight, k_weight):
            if weight != dtype:
                return f"needs weights in {dtype}, got {weight}"
        return None

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
        return flashinfer_qk_norm_rope_gate(qkv, positions, q_weight, k_weight, cos_sin, num_heads, num_kv_heads, eps)


@operator(empty_heads)
def flashinfer_qk_norm_rope_gate(
    qkv: Tensor,
    positions: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`qnext_kernels.qk_norm_rope_gate`."""
    from flashinfer.rope import apply_rope_with_cos_sin_cache

    _, _, v, gate = results = empty_heads(qkv, positions, q_weight, k_weight, cos_sin, num_heads, num_kv_heads, eps)
    if qkv.numel() == 0:
        return results
    head_dim = q_weight.shape[0]
    heads = qkv.unflatten(1, (-1, head_dim))
    of_q, of_k, of_v = heads.split([2 * num_heads, num_kv_heads, num_kv_heads], dim=1)
    v.view(of_v.shape).copy_(of_v)
    gate.view(-1, num_heads, head_dim).copy_(of_q[:, 1::2])
    q = flashinfer_gemma_rmsnorm(of_q[:, 0::2], q_weight, eps).flatten(1)
    k = flashinfer_gemma_rmsnorm(of_k, k_weight, eps).flatten(1)
    # Positions of padding may be anything; the kernel reads the table wherever they say.
    known = positions.clamp(0, cos_sin.shape[0] - 1)
    with torch.cuda.device_of(qkv):
        q, k = apply_rope_with_cos_sin_cache(known, q, k, head_dim, aligned_rows(cos_sin.contiguous()), is_neox=True)
    return q, k, v, gate
