"""Weights in group-wise int4."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels import ExpertsWeights, LinearWeight
from qnext_kernels.integers import INT4, INT4_PER_WORD, INT_GROUPS, quantize_int4


def random_int4_weight(*shape: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random numbers in int4 that stand for [..., N, K], and scales."""
    *rows, k = shape
    words = torch.randint(-(2**31), 2**31, (*rows, k // INT4_PER_WORD), dtype=INT4)
    # Groups that differ by more than their numbers: a scale of another group would be seen.
    scale = torch.randn(*rows, k // group).exp() * k**-0.5 / 8
    return words, scale.to(dtype)


def words_of(codes: Tensor) -> Tensor:
    """[..., K] codes from 0 to 15 as [..., K / 8] int32."""
    shifts = 4 * torch.arange(INT4_PER_WORD)
    return (codes.long().unflatten(-1, (-1, INT4_PER_WORD)) << shifts).sum(dim=-1).to(INT4)


def linear_in_int4(linear: LinearWeight, group: int = INT_GROUPS[0]) -> LinearWeight:
    weight, scale = quantize_int4(linear.weight, group)
    return linear._replace(weight=weight, scale=scale)


def experts_in_int4(moe: ExpertsWeights, group: int = INT_GROUPS[0]) -> ExpertsWeights:
    (w13, w13_scale), (w2, w2_scale) = quantize_int4(moe.w13, group), quantize_int4(moe.w2, group)
    shared = None
    if moe.shared is not None:
        up, down, gate = moe.shared
        shared = *quantize_int4(up, group), *quantize_int4(down, group), gate
    return ExpertsWeights(w13, w2, False, shared, (w13_scale, w2_scale))
