"""The definition of the gated RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import Backend
from qnext_kernels.elementwise import silu


class ReferenceBackend(Backend):
    """Readable PyTorch, in float32 (float64 for float64 inputs); ``out`` is written, and may be ``x``."""

    name = "reference"

    def gated_rms_norm(self, x: Tensor, z: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        normed = x.to(dtype) / torch.sqrt(x.to(dtype).square().mean(dim=-1, keepdim=True) + eps)
        out.copy_(normed * weight.to(dtype) * silu(z.to(dtype)))
