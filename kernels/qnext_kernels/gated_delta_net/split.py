"""What lies where in the projections and behind the convolution; the sizes are those of the state pool."""

from __future__ import annotations

import torch
from torch import Tensor


def split_projections(qkvz: Tensor, ba: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Undo the grouping by key head: ``mixed_qkv`` [T, 2 H K + HV V], z [T, HV, V], b and a [T, HV]."""
    _, value_heads, value_dim, key_dim = state.shape
    group = value_heads // qkvz.shape[1]
    q, k, v, z = qkvz.split([key_dim, key_dim, group * value_dim, group * value_dim], dim=2)
    b, a = ba.split(group, dim=2)
    mixed_qkv = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=1)
    return mixed_qkv, z.reshape(len(z), value_heads, value_dim), b.flatten(1), a.flatten(1)


def split_convolved(convolved: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[T, 2 H K + HV V] → q, k [T, H, K] and v [T, HV, V]."""
    _, value_heads, value_dim, key_dim = state.shape
    keys = (convolved.shape[1] - value_heads * value_dim) // 2
    q, k, v = convolved.split([keys, keys, value_heads * value_dim], dim=1)
    return q.unflatten(1, (-1, key_dim)), k.unflatten(1, (-1, key_dim)), v.unflatten(1, (-1, value_dim))
