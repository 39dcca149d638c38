"""What the operators of a fused split, norm and rotation allocate, and what torch.compile is told of it."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_heads(
    qkv: Tensor,
    positions: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty q, k, v and gate of :func:`qnext_kernels.qk_norm_rope_gate`."""
    tokens, head_dim = qkv.shape[0], q_weight.shape[0]
    widths = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim, num_heads * head_dim)
    q, k, v, gate = [torch.empty(tokens, width, dtype=qkv.dtype, device=qkv.device) for width in widths]
    return q, k, v, gate
