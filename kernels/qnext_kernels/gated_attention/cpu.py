"""Vectorised PyTorch; under torch.compile the whole chain becomes a few loops."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import Backend
from qnext_kernels.elementwise import sigmoid


class CpuBackend(Backend):
    """Float32; query and key heads are normalised and rotated together."""

    name = "cpu"
    devices = ("cpu",)

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
        head_dim, rotary_dim = q_weight.shape[0], cos_sin.shape[1]
        heads = qkv.view(qkv.shape[0], 2 * (num_heads + num_kv_heads), head_dim)
        gate = heads[:, 1 : 2 * num_heads : 2]
        v = heads[:, 2 * num_heads + num_kv_heads :]
        x = torch.cat([heads[:, : 2 * num_heads : 2], heads[:, 2 * num_heads : 2 * num_heads + num_kv_heads]], dim=1)
        x = x.float()
        weight = torch.cat([q_weight.expand(num_heads, -1), k_weight.expand(num_kv_heads, -1)]).float()
        x = x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + eps) * (1.0 + weight)
        cos, sin = cos_sin[positions].float()[:, None, :].chunk(2, dim=-1)
        first, second, rest = x.split([rotary_dim // 2, rotary_dim // 2, head_dim - rotary_dim], dim=-1)
        x = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(qkv.dtype)
        q, k = x.split([num_heads, num_kv_heads], dim=1)
        return q.flatten(1), k.flatten(1), v.flatten(1), gate.flatten(1)

    def sigmoid_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        return (x.float() * sigmoid(gate.float())).to(x.dtype)
