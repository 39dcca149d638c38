"""Block-wise FP8 (e4m3) of transformers' fine-grained FP8 and the ``-FP8`` checkpoints: what its numbers mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext_kernels.checks import expect_dtype, expect_shape
from qnext_kernels.dispatch import BackendError

FP8 = torch.float8_e4m3fn
FP8_GROUP = 128
"""Rows and columns of FP8 weights, and columns of activations, that share a scale."""
FP8_MAX = 448.0
"""The largest number of e4m3."""
FP8_TINY = 1e-10
"""A group of activations is scaled as if its largest magnitude were at least this."""


def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each group of FP8_GROUP columns to e4m3, scaled so that its largest magnitude becomes 448.

    Args:
        x: [..., D], any float dtype.

    Returns:
        [..., D] float8_e4m3fn and scales [..., ceil(D / FP8_GROUP)] float32: x ≈ quantized · scale.
    """
    size = x.shape[-1]
    groups = -(-size // FP8_GROUP)
    padded = F.pad(x.float(), (0, groups * FP8_GROUP - size)).unflatten(-1, (groups, FP8_GROUP))
    largest = padded.abs().amax(dim=-1).clamp(min=FP8_TINY)
    # By a tensor: on a GPU, PyTorch multiplies by a number's reciprocal, which rounds twice.
    scales = largest / largest.new_tensor(FP8_MAX)
    quantized = (padded / scales[..., None]).clamp(-FP8_MAX, FP8_MAX)
    return quantized.flatten(-2)[..., :size].to(FP8), scales


def dequantize_groups(quantized: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What :func:`quantize_groups` returned as [..., D] of a dtype."""
    return quantized.to(dtype) * scales.repeat_interleave(FP8_GROUP, dim=-1)[..., : quantized.shape[-1]].to(dtype)


def dequantize_blocks(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., N, K] in e4m3 with a scale for each block of FP8_GROUP² elements as [..., N, K] of a dtype.

    Args:
        weight: [..., N, K] float8_e4m3fn.
        scale: [..., ceil(N / FP8_GROUP), ceil(K / FP8_GROUP)] float32, ``weight_scale_inv`` of a checkpoint.
    """
    rows, columns = weight.shape[-2:]
    for dim, size in ((-2, rows), (-1, columns)):
        scale = scale.repeat_interleave(FP8_GROUP, dim=dim).narrow(dim, 0, size)
    return weight.to(dtype) * scale.to(dtype)


def dequantize_w13(w13: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`dequantize_blocks` of gate and up projections, [..., 2·I, K], whose blocks are apart."""
    blocks = dequantize_blocks(w13.unflatten(-2, (2, -1)), scale.unflatten(-2, (2, -1)), dtype)
    return blocks.flatten(-3, -2)


def expect_scale(name: str, scale: Tensor, weight: Tensor, halves: int = 1) -> None:
    """Raise unless ``scale`` is that of a weight [..., N, K] in FP8, of ``halves`` matrices one below the other."""
    expect_shape(name, scale, _blocks(weight, halves))
    expect_dtype(name, scale, (torch.float32,))


def reads_scale(scale: Tensor, weight: Tensor, halves: int = 1) -> bool:
    """Whether a weight is in FP8 and ``scale`` what :func:`expect_scale` allows."""
    return weight.dtype == FP8 and scale.dtype == torch.float32 and scale.shape == _blocks(weight, halves)


def expect_quantized(backend: str, quantize: bool) -> None:
    """Raise BackendError unless activations are to be quantized, for a backend that always does."""
    if not quantize:
        raise BackendError(f"quantize_activations: backend {backend} quantizes them, expected True, got False")


def _blocks(weight: Tensor, halves: int) -> tuple[int, ...]:
    *leading, rows, columns = weight.shape
    return *leading, halves * -(-rows // halves // FP8_GROUP), -(-columns // FP8_GROUP)
