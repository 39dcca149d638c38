"""Weights in block-wise FP8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext_kernels import ExpertsWeights, LinearWeight
from qnext_kernels.fp8 import FP8, FP8_GROUP, FP8_MAX


def quantize_blocks(weight: Tensor, halves: int = 1) -> tuple[Tensor, Tensor]:
    """[..., N, K] in e4m3 with the scales of its blocks, those of each of ``halves`` of the rows apart."""
    parts = weight.float().unflatten(-2, (halves, -1))
    rows, columns = parts.shape[-2:]
    n, k = -(-rows // FP8_GROUP), -(-columns // FP8_GROUP)
    padded = F.pad(parts, (0, k * FP8_GROUP - columns, 0, n * FP8_GROUP - rows))
    blocks = padded.unflatten(-1, (k, FP8_GROUP)).unflatten(-3, (n, FP8_GROUP))
    scales = blocks.abs().amax(dim=(-3, -1), keepdim=True).clamp(min=1e-6) / FP8_MAX
    values = (blocks / scales).clamp(-FP8_MAX, FP8_MAX).flatten(-4, -3).flatten(-2)[..., :rows, :columns]
    return values.flatten(-3, -2).to(FP8).contiguous(), scales[..., 0, :, 0].flatten(-3, -2).contiguous()


def all_codes(rows: int, columns: int) -> Tensor:
    """[rows, columns] that go through all numbers of e4m3, with both zeros and without NaN."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes % 128 != 127]
    return codes[torch.arange(rows * columns) % len(codes)].view(rows, columns).view(FP8)


def linear_in_fp8(linear: LinearWeight) -> LinearWeight:
    weight, scale = quantize_blocks(linear.weight)
    return linear._replace(weight=weight, scale=scale)


def experts_in_fp8(moe: ExpertsWeights) -> ExpertsWeights:
    w13, w13_scale = quantize_blocks(moe.w13, halves=2)
    w2, w2_scale = quantize_blocks(moe.w2)
    shared = None
    if moe.shared is not None:
        up, down, gate = moe.shared
        shared = *quantize_blocks(up, halves=2), *quantize_blocks(down), gate
    return ExpertsWeights(w13, w2, False, shared, (w13_scale, w2_scale))
