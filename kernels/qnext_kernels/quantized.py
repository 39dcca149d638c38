"""Weights with scales, in block-wise FP8 or in group-wise int4 or int8: what a dtype says of how they are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels import fp8, integers
from qnext_kernels.fp8 import FP8
from qnext_kernels.integers import GROUPED, INT4, INT4_PER_WORD, INT8

SharedWeights = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]
"""w13, w2, each with its scales behind it, and gate of a shared expert; None for scales of weights without them."""
SCALED = (FP8, *GROUPED)
"""Dtypes of weights that have scales."""


def stored_columns(name: str, columns: int, dtype: torch.dtype) -> int:
    """The last size of a weight of so many columns in a dtype; raises ValueError if it has none."""
    if dtype != INT4:
        return columns
    if columns % INT4_PER_WORD:
        raise ValueError(f"{name}: expected columns in eights beside weights in int4, got {columns}")
    return columns // INT4_PER_WORD


def stored_alike(*weights: tuple[Tensor, Tensor | None]) -> bool:
    """Whether weights, each with its scale, have one dtype, and in int4 and int8 groups of one size."""
    return len({(weight.dtype, integers.group_of(weight, scale)) for weight, scale in weights}) == 1


def dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype, halves: int = 1) -> Tensor:
    """[..., N, K] of a dtype; ``halves`` matrices lie one below the other, and in FP8 have blocks of their own."""
    if scale is None:
        return weight.to(dtype)
    if weight.dtype == INT4:
        return integers.dequantize_int4(weight, scale, dtype)
    if weight.dtype == INT8:
        return integers.dequantize_int8(weight, scale, dtype)
    return fp8.dequantize_blocks(weight, scale, dtype) if halves == 1 else fp8.dequantize_w13(weight, scale, dtype)


def expect_scale(name: str, scale: Tensor, weight: Tensor, dtype: torch.dtype, halves: int = 1) -> None:
    """Raise unless ``scale`` is that of a weight, of ``halves`` matrices, for activations of ``dtype``."""
    if weight.dtype in GROUPED:
        integers.expect_group_scale(name, scale, weight, dtype)
    else:
        fp8.expect_scale(name, scale, weight, halves)


def reads_scale(scale: Tensor, weight: Tensor, dtype: torch.dtype, halves: int = 1) -> bool:
    """Whether a weight has scales, and ``scale`` is what :func:`expect_scale` allows."""
    if weight.dtype in GROUPED:
        return integers.reads_group_scale(scale, weight, dtype)
    return fp8.reads_scale(scale, weight, halves)
