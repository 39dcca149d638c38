"""The definition of the zero-centred RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import Backend


class ReferenceBackend(Backend):
    """Readable PyTorch, in float32 (float64 for float64 inputs)."""

    name = "reference"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        total = x if residual is None else x + residual
        normed = total.to(dtype) / torch.sqrt(total.to(dtype).square().mean(dim=-1, keepdim=True) + eps)
        return (normed * (1.0 + weight.to(dtype))).to(x.dtype), total
