"""PyTorch's linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext_kernels.dispatch import Backend, refuse_if_deterministic
from qnext_kernels.quantized import dequantize


class CpuBackend(Backend):
    """A row's bits may depend on how many rows there are: the BLAS behind ``F.linear`` picks its kernel by that."""

    name = "cpu"
    devices = ("cpu",)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        refuse_if_deterministic("linear", "PyTorch's linear")
        return F.linear(x, weight, bias)

    def linear_scaled(self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
        refuse_if_deterministic("linear", "PyTorch's linear")
        bias = None if bias is None else bias.float()
        return F.linear(x.float(), dequantize(weight, scale, torch.float32), bias).to(x.dtype)
