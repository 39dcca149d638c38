"""Split, QK-norm, partial RoPE and output gate in C++ (``csrc/attention_glue.cpp``)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qnext_kernels.checks import expect_indices
from qnext_kernels.gated_attention.cpu import CpuBackend
from qnext_kernels.native import DTYPES, NativeBackend
from qnext_kernels.operators import operator
from qnext_kernels.rows import as_rows, packed_function, row_counts, rows


class GatedAttentionNative(NativeBackend, CpuBackend):
    """Float32, one head at a time, straight from the projection to its results."""

    name = "native"

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
        arguments = (qkv, positions, q_weight, k_weight, cos_sin, num_heads, num_kv_heads, eps)
        if not {q_weight.dtype, k_weight.dtype, cos_sin.dtype} <= DTYPES.keys():
            expect_indices("positions", positions, 0, cos_sin.shape[0])
            return super().qk_norm_rope_gate(*arguments)
        q, k, gate = qk_norm_rope_gate(*arguments)
        return q, k, qkv[:, -k.shape[1] :], gate

    def sigmoid_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        if gate.dtype not in DTYPES:
            return super().sigmoid_gate(x, gate)
        return sigmoid_gate(x, gate)


def _empty_heads(
    qkv: Tensor,
    positions: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, head_dim = qkv.shape[0], q_weight.shape[0]
    q, k, gate = (qkv.new_empty(tokens, heads * head_dim) for heads in (num_heads, num_kv_heads, num_heads))
    return q, k, gate


@operator(_empty_heads)
def qk_norm_rope_gate(
    qkv: Tensor,
    positions: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, gate = _empty_heads(qkv, positions, q_weight, k_weight, cos_sin, num_heads, num_kv_heads, eps)
    qkv, cos_sin, positions = as_rows(qkv), as_rows(cos_sin), positions.contiguous()
    q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
    weights = (q_weight.data_ptr(), DTYPES[q_weight.dtype], k_weight.data_ptr(), DTYPES[k_weight.dtype])
    in_range = _kernel()(
        *(qkv.data_ptr(), DTYPES[qkv.dtype], qkv.stride(0)),
        *(positions.data_ptr(), positions.dtype == torch.int64),
        *weights,
        *(cos_sin.data_ptr(), DTYPES[cos_sin.dtype], cos_sin.stride(0)),
        *(q.data_ptr(), k.data_ptr(), gate.data_ptr()),
        *(qkv.shape[0], num_heads, num_kv_heads, q_weight.shape[0], cos_sin.shape[1], cos_sin.shape[0], eps),
    )
    if not in_range:
        expect_indices("positions", positions, 0, cos_sin.shape[0])
    return q, k, gate


@operator(lambda x, gate: torch.empty_like(x, memory_format=torch.contiguous_format))
def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, gate = as_rows(x), as_rows(gate)
    _gate_kernel()(*rows(x), *rows(gate), out.data_ptr(), *row_counts(x), gate.shape[-1])
    return out


_kernel = cache(lambda: packed_function("qnext_qk_norm_rope_gate", "21qd"))
_gate_kernel = cache(lambda: packed_function("qnext_sigmoid_gate", "13q"))
