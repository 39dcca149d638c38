"""The routed experts in C++ (``csrc/experts.cpp``), over weights as the checkpoint stores them or packed."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qnext_kernels.linear.native import LinearNative
from qnext_kernels.moe import elementwise_native
from qnext_kernels.moe.cpu import CpuBackend
from qnext_kernels.native import DTYPES, NativeBackend
from qnext_kernels.rows import indices, packed_function


class MoeNative(NativeBackend, CpuBackend):
    """Every product accumulates in float32 in one order: a token's bits do not depend on the rest of the batch."""

    name = "native"

    def topk_softmax(self, router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        return elementwise_native.topk_softmax(router_logits, top_k, renormalize)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        return elementwise_native.silu_and_mul(x)

    def experts(self, x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        if not (w13.is_contiguous() and w2.is_contiguous()):
            return super().experts(x, w13, w2, topk_weights, topk_ids)
        return self._run(x, w13, w2, topk_weights, topk_ids, packed=False)

    def experts_packed(self, x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return self._run(x, w13, w2, topk_weights, topk_ids, packed=True)

    def gate_logits(self, x: Tensor, gate: Tensor) -> Tensor:
        return LinearNative().linear(x, gate[None], None)

    def _run(self, x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, packed: bool) -> Tensor:
        x = x if x.stride()[1] == 1 else x.contiguous()
        topk_weights, topk_ids = topk_weights.contiguous(), topk_ids.contiguous()
        out = torch.empty(x.shape, dtype=x.dtype)
        tokens, hidden = x.shape
        _kernel()(
            *(x.data_ptr(), w13.data_ptr(), w2.data_ptr(), topk_weights.data_ptr(), *indices(topk_ids)),
            *(out.data_ptr(), DTYPES[x.dtype], x.stride()[0], tokens, topk_ids.shape[1]),
            *(w13.shape[0], hidden, w2.shape[2], packed),
        )
        return out


_kernel = cache(lambda: packed_function("qnext_experts", "15q"))
