"""The zero-centred RMSNorm as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qnext_kernels import rms_norm


class RMSNorm(nn.Module):
    """x̂ · (1 + weight) over the last axis; with a residual, of the sum, which it returns too."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the normalised [..., D] and x + residual [..., D] (``x`` without a residual)."""
        return rms_norm(x, self.weight, self.eps, residual)
