"""Vectorised PyTorch; under torch.compile the whole chain becomes one loop."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import Backend


class CpuBackend(Backend):
    """Float32, with one reciprocal square root a row."""

    name = "cpu"
    devices = ("cpu",)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        total32 = total.float()
        scale = torch.rsqrt((total32 * total32).mean(dim=-1, keepdim=True) + eps)
        return (total32 * scale * (1.0 + weight.float())).to(x.dtype), total
