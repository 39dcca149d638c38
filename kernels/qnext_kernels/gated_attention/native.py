"""Split, QK-norm, partial RoPE and output gate in C++ (``csrc/attention_glue.cpp``)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qnext_kernels.checks import expect_indices
from qnext_kernels.gated_attention.cpu import CpuBackend
from qnext_kernels.gated_attention.results import empty_heads
from qnext_kernels.native import DTYPES, NativeBackend
from qnext_kernels.operators import operator
from qnext_kernels.rows import floats, packed_function, row_counts, rows


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
        return qk_norm_rope_gate(*arguments)

    def sigmoid_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        if gate.dtype not in DTYPES:
            return super().sigmoid_gate(x, gate)
        return sigmoid_gate(x, gate)


@operator(empty_heads)
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
    q, k, v, gate = empty_heads(qkv, positions, q_weight, k_weight, cos_sin, num_heads, num_kv_heads, eps)
    qkv, (projection, dtype, _, token_stride) = rows(qkv)
    cos_sin, (table, table_dtype, _, table_stride) = rows(cos_sin)
    q_weight, k_weight, positions = q_weight.contiguous(), k_weight.contiguous(), positions.contiguous()
    tokens = (projection, dtype, token_stride, positions.data_ptr(), positions.dtype == torch.int64)
    tables = (*floats(q_weight), *floats(k_weight), table, table_dtype, table_stride)
    results = (q.data_ptr(), k.data_ptr(), v.data_ptr(), gate.data_ptr())
    sizes = (qkv.shape[0], num_heads, num_kv_heads, q_weight.shape[0], cos_sin.shape[1], cos_sin.shape[0])
    if not _kernel()(*tokens, *tables, *results, *sizes, eps):
        expect_indices("positions", positions, 0, cos_sin.shape[0])
    return q, k, v, gate


@operator(lambda x, gate: torch.empty_like(x, memory_format=torch.contiguous_format))
def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (x, x_rows), (gate, gate_rows) = rows(x), rows(gate)
    _gate_kernel()(*x_rows, *gate_rows, out.data_ptr(), *row_counts(x), gate.shape[-1])
    return out


_kernel = cache(lambda: packed_function("qnext_qk_norm_rope_gate", "22qd"))
_gate_kernel = cache(lambda: packed_function("qnext_sigmoid_gate", "13q"))
