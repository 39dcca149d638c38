"""The router's top-k and SwiGLU's middle in C++ (``csrc/router.cpp``), for float32 and bfloat16."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qnext_kernels.operators import operator
from qnext_kernels.rows import packed_function, row_counts, rows


def _empty_choice(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    tokens = router_logits.shape[0]
    weights = router_logits.new_empty(tokens, top_k, dtype=torch.float32)
    return weights, router_logits.new_empty(tokens, top_k, dtype=torch.int32)


@operator(_empty_choice)
def topk_softmax(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """:func:`qnext_kernels.topk_softmax`; of equal probabilities, that of the lower index comes first."""
    weights, ids = _empty_choice(router_logits, top_k, renormalize)
    logits, logit_rows = rows(router_logits)
    _topk_kernel()(*logit_rows, weights.data_ptr(), ids.data_ptr(), *logits.shape, top_k, renormalize)
    return weights, ids


def _empty_half(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@operator(_empty_half)
def silu_and_mul(x: Tensor) -> Tensor:
    """:func:`qnext_kernels.silu_and_mul`."""
    out = _empty_half(x)
    x, x_rows = rows(x)
    outer, inner, double = row_counts(x)
    _silu_kernel()(*x_rows, out.data_ptr(), outer, inner, double // 2)
    return out


_topk_kernel = cache(lambda: packed_function("qnext_topk_softmax", "10q"))
_silu_kernel = cache(lambda: packed_function("qnext_silu_and_mul", "8q"))
