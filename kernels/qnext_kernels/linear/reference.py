"""The definition of a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import Backend
from qnext_kernels.quantized import dequantize


class ReferenceBackend(Backend):
    """Readable PyTorch, in float32 (float64 for float64 inputs)."""

    name = "reference"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        out = x.to(dtype) @ weight.to(dtype).T
        return (out if bias is None else out + bias.to(dtype)).to(x.dtype)

    def linear_scaled(self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if bias is None else bias.to(dtype)
        return self.linear(x.to(dtype), dequantize(weight, scale, dtype), bias).to(x.dtype)
