"""Split, QK-norm, partial RoPE and output gate in Triton, one launch each."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.gated_attention.results import empty_heads
from qnext_kernels.operators import operator
from qnext_kernels.triton_support import TritonBackend


class TritonGatedAttention(TritonBackend):
    """Float32, straight from the projection to its results.

    The host does not check positions: where the table does not have one, the dimensions that RoPE turns become zero.
    """

    batch_invariant = True

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
        return triton_qk_norm_rope_gate(qkv, positions, q_weight, k_weight, cos_sin, num_heads, num_kv_heads, eps)

    def sigmoid_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        return triton_sigmoid_gate(x, gate)


@operator(empty_heads)
def triton_qk_norm_rope_gate(
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
    from qnext_kernels.gated_attention.triton_heads import run_qk_norm_rope_gate

    results = empty_heads(qkv, positions, q_weight, k_weight, cos_sin, num_heads, num_kv_heads, eps)
    with torch.cuda.device_of(qkv):
        run_qk_norm_rope_gate(qkv, positions, q_weight, k_weight, cos_sin, eps, results)
    return results


@operator(lambda x, gate: torch.empty_like(x, memory_format=torch.contiguous_format))
def triton_sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """:func:`qnext_kernels.sigmoid_gate`."""
    from qnext_kernels.gated_attention.triton_gate import run_sigmoid_gate

    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(x):
        run_sigmoid_gate(x, gate, out)
    return out
