"""The definition of split, QK-norm, partial RoPE and output gate."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import Backend
from qnext_kernels.elementwise import sigmoid


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Zero-centred RMSNorm of x [T, heads, head_dim], then RoPE on its first 2·cos.shape[1] dimensions.

    ``cos`` and ``sin`` are [T, rotary_dim / 2]; all tensors have one float dtype.
    """
    x = x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps) * (1.0 + weight)
    half = cos.shape[1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class ReferenceBackend(Backend):
    """Readable PyTorch, in float32 (float64 for float64 inputs)."""

    name = "reference"

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
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        head_dim = q_weight.shape[0]
        heads = qkv.view(qkv.shape[0], 2 * (num_heads + num_kv_heads), head_dim)
        q_gate, k, v = heads.split([2 * num_heads, num_kv_heads, num_kv_heads], dim=1)
        q, gate = q_gate[:, 0::2], q_gate[:, 1::2]
        cos, sin = cos_sin[positions].to(dtype).chunk(2, dim=-1)
        q = norm_rope(q.to(dtype), q_weight.to(dtype), cos, sin, eps).to(qkv.dtype)
        k = norm_rope(k.to(dtype), k_weight.to(dtype), cos, sin, eps).to(qkv.dtype)
        return q.flatten(1), k.flatten(1), v.flatten(1), gate.flatten(1)

    def sigmoid_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (x.to(dtype) * sigmoid(gate.to(dtype))).to(x.dtype)
