"""Inputs as a projection leaves them: grouped by key head, of each its q, its k and the v of its value heads."""

from __future__ import annotations

import torch
from torch import Tensor


def ungrouped(x: Tensor, key_dim: int | None) -> Tensor:
    """[T, H, 2 K + G V] → [T, D]: all q, all k and all v, copied. Without ``key_dim`` x is that already."""
    if key_dim is None:
        return x
    q, k, v = x.split([key_dim, key_dim, x.shape[2] - 2 * key_dim], dim=2)
    return torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=1)
