"""Activations whose result for an element does not depend on where in a tensor it stands.

torch.sigmoid, silu and softplus round differently in the vector body and in the scalar tail of a tensor, so that a
token's value depends on its neighbours in the batch. torch.exp, log1p and the arithmetic below do not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(−x))."""
    return 1.0 / (1.0 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x)."""
    return x / (1.0 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), without overflow."""
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0.0)
