"""The inputs of the delta rule as libraries of kernels want them: heads apart, gates computed before."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qnext_plugins.cli.bench.inputs import PerTensor

Heads = tuple[int, int, int]
"""Key heads, value heads, dimension of a head."""

starts_in_int64 = PerTensor(lambda starts: starts.long())


def heads_apart(convolved: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """q and k [T, H, K] and v [T, HV, V], contiguous, of what the convolution leaves [T, channels]."""
    key_heads, value_heads, dim = heads
    parts = convolved.split([key_heads * dim, key_heads * dim, value_heads * dim], dim=1)
    q, k, v = (part.unflatten(1, (-1, dim)).contiguous() for part in parts)
    return q, k, v


def gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Log decay and write strength, [T, HV] in float32."""
    g = -A_log.float().exp() * functional.softplus(a.float() + dt_bias.float())
    return g, torch.sigmoid(b.float())
