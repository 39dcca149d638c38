"""Routing and SwiGLU's middle in Triton, one launch each."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.moe.reference import ReferenceBackend
from qnext_kernels.operators import operator
from qnext_kernels.triton_support import TritonBackend


class TritonMoe(TritonBackend, ReferenceBackend):
    """Everything between the matrix products is float32 and is rounded once."""

    name = "triton"

    def topk_softmax(self, router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        return triton_topk_softmax(router_logits, top_k, renormalize)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        return triton_silu_and_mul(x)


def _empty_choice(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    shape = router_logits.shape[0], top_k
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int32)


@operator(_empty_choice)
def triton_topk_softmax(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """:func:`qnext_kernels.topk_softmax`; of equal probabilities, that of the lower index comes first."""
    from qnext_kernels.moe.triton_router import run_topk_softmax

    weights, ids = _empty_choice(router_logits, top_k, renormalize)
    with torch.cuda.device_of(router_logits):
        run_topk_softmax(router_logits, weights, ids, renormalize)
    return weights, ids


def _empty_half(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@operator(_empty_half)
def triton_silu_and_mul(x: Tensor) -> Tensor:
    """:func:`qnext_kernels.silu_and_mul`."""
    from qnext_kernels.moe.triton_router import run_silu_and_mul

    out = _empty_half(x)
    with torch.cuda.device_of(x):
        run_silu_and_mul(x, out)
    return out
