"""Group-wise int4 and int8: what their numbers mean.

They are those of compressed-tensors' ``pack-quantized`` checkpoints (W4A16, W8A16); source: ``compressed_tensors``'
``pack_to_int32`` and ``dequantize``, for symmetric weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.checks import expect_dtype, expect_shape

INT4 = torch.int32
"""The dtype of weights in int4: eight columns of a row are one number."""
INT8 = torch.uint8
"""The dtype of weights in int8: a number, −128 … 127, is stored as itself + 128."""
GROUPED = (INT4, INT8)
"""Dtypes of weights whose columns share scales in groups."""
INT_GROUPS = (32, 64, 128)
"""Numbers of columns of a row that may share a scale."""
INT4_PER_WORD = 8
"""Columns in 32 bits of a weight in int4, the first in the lowest four; a number is stored as itself + 8."""


def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round each group of columns to −8 … 7, scaled so that its largest magnitude becomes 7.5.

    Args:
        weight: [..., N, K], any float dtype.
        group: one of INT_GROUPS that divides K.

    Returns:
        [..., N, K / 8] int32 and scales [..., N, K / group] in the dtype of ``weight``.
    """
    numbers, scale = _quantize(weight, group, 8)
    columns = (numbers.to(INT4) + 8).unflatten(-1, (-1, INT4_PER_WORD)).unbind(-1)
    words = columns[0]
    for n, column in enumerate(columns):
        words = words | column << 4 * n
    return words, scale


def quantize_int8(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round each group of columns to −128 … 127, scaled so that its largest magnitude becomes 127.5.

    Args:
        weight: [..., N, K], any float dtype.
        group: one of INT_GROUPS that divides K.

    Returns:
        [..., N, K] uint8 and scales [..., N, K / group] in the dtype of ``weight``.
    """
    numbers, scale = _quantize(weight, group, 128)
    return (numbers + 128).to(INT8), scale


QUANTIZE = {4: quantize_int4, 8: quantize_int8}
"""By the bits of a number; :func:`qnext_kernels.quantized.dequantize` reads either."""


def dequantize_int4(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., N, K / 8] int32 with scales [..., N, K / group] as [..., N, K] of a dtype."""
    numbers = torch.stack([(weight >> 4 * n) & 15 for n in range(INT4_PER_WORD)], dim=-1).flatten(-2) - 8
    return _scaled(numbers, scale, dtype)


def dequantize_int8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., N, K] uint8 with scales [..., N, K / group] as [..., N, K] of a dtype."""
    return _scaled(weight.int() - 128, scale, dtype)


def _scaled(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (numbers.unflatten(-1, (scale.shape[-1], -1)).to(dtype) * scale.to(dtype)[..., None]).flatten(-2)


def columns_of(weight: Tensor) -> int:
    """K of a weight [..., N, K], in int4 stored as [..., N, K / 8]."""
    return weight.shape[-1] * (INT4_PER_WORD if weight.dtype == INT4 else 1)


def expect_group_scale(name: str, scale: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """Raise unless ``scale`` is that of a weight [..., N, K] in int4 or int8, for activations of a dtype."""
    expect_shape(name, scale, (*weight.shape[:-1], None))
    expect_dtype(name, scale, (dtype,))
    if not _is_group(weight, scale):
        raise ValueError(
            f"{name}: expected one for each {', '.join(map(str, INT_GROUPS))} of {columns_of(weight)} columns, "
            f"got {scale.shape[-1]}"
        )


def reads_group_scale(scale: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a weight is in int4 or int8 and ``scale`` what :func:`expect_group_scale` allows."""
    fits = weight.dtype in GROUPED and scale.dtype == dtype and scale.shape[:-1] == weight.shape[:-1]
    return fits and _is_group(weight, scale)


def group_of(weight: Tensor, scale: Tensor | None) -> int:
    """Columns of a weight in int4 or int8 that share a scale; 0 of other weights."""
    if weight.dtype not in GROUPED or scale is None:
        return 0
    return columns_of(weight) // max(scale.shape[-1], 1)


def _quantize(weight: Tensor, group: int, levels: int) -> tuple[Tensor, Tensor]:
    """Numbers from −levels to levels − 1 [..., N, K], as floats, and scales [..., N, K / group]."""
    groups = weight.unflatten(-1, (-1, group)).float()
    scale = (groups.abs().amax(dim=-1) / (levels - 0.5)).to(weight.dtype)
    # A group of zeros has a scale of one, so that nothing is divided by zero.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (groups / scale.float()[..., None]).round().clamp(-levels, levels - 1).flatten(-2), scale


def _is_group(weight: Tensor, scale: Tensor) -> bool:
    columns = columns_of(weight)
    return columns > 0 and columns in {group * scale.shape[-1] for group in INT_GROUPS}
