"""Weights in group-wise int4 and int8."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels import ExpertsWeights, LinearWeight
from qnext_kernels.integers import INT4, INT4_PER_WORD, INT8, INT_GROUPS, quantize_int4, quantize_int8

LEVELS = {INT4: 8, INT8: 128}
"""By how a weight is stored: as many numbers below zero as from it on."""
QUANTIZE = {INT4: quantize_int4, INT8: quantize_int8}


def random_weight(*shape: int, stored: torch.dtype, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random numbers that stand for [..., N, K], and scales."""
    *rows, k = shape
    weight = as_stored(torch.randint(-LEVELS[stored], LEVELS[stored], shape), stored)
    # Groups that differ by more than their numbers: a scale of another group would be seen.
    scale = torch.randn(*rows, k // group).exp() * k**-0.5 / LEVELS[stored]
    return weight, scale.to(dtype)


def as_stored(numbers: Tensor, stored: torch.dtype) -> Tensor:
    """Integers [..., K] as a weight has them."""
    if stored == INT8:
        return (numbers + 128).to(INT8)
    shifts = 4 * torch.arange(INT4_PER_WORD)
    return ((numbers.long() + 8).unflatten(-1, (-1, INT4_PER_WORD)) << shifts).sum(dim=-1).to(INT4)


def linear_in_integers(linear: LinearWeight, stored: torch.dtype, group: int = INT_GROUPS[0]) -> LinearWeight:
    weight, scale = QUANTIZE[stored](linear.weight, group)
    return linear._replace(weight=weight, scale=scale)


def experts_in_int4(moe: ExpertsWeights, shared: torch.dtype = INT4, group: int = INT_GROUPS[0]) -> ExpertsWeights:
    """Routed experts in int4, a shared one as it says, which may be the dtype that it has."""
    (w13, w13_scale), (w2, w2_scale) = quantize_int4(moe.w13, group), quantize_int4(moe.w2, group)
    extra = moe.shared
    if extra is not None and shared in QUANTIZE:
        up, down, gate = extra
        extra = *QUANTIZE[shared](up, group), *QUANTIZE[shared](down, group), gate
    return ExpertsWeights(w13, w2, False, extra, (w13_scale, w2_scale))
