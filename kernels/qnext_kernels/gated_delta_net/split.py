"""What lies where in the projections and behind the convolution; the sizes are those of the state pool."""

from __future__ import annotations

from torch import Tensor


def split_projections(qkvz: Tensor, ba: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inputs of the convolution [T, H, 2 K + G V] and z [T, H, G, V], where they lie; b and a [T, HV], copied."""
    _, value_heads, value_dim, key_dim = state.shape
    group = value_heads // qkvz.shape[1]
    tokens, key_heads, _ = qkvz.shape
    grouped_qkv, z = qkvz.split_with_sizes([2 * key_dim + group * value_dim, group * value_dim], 2)
    b, a = ba.view(tokens, key_heads, 2, group).transpose(1, 2).flatten(2).unbind(1)
    return grouped_qkv, z.view(tokens, key_heads, group, value_dim), b, a


def split_convolved(convolved: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[T, 2 H K + HV V] → q, k [T, H, K] and v [T, HV, V]."""
    _, value_heads, value_dim, key_dim = state.shape
    keys = (convolved.shape[1] - value_heads * value_dim) // 2
    tokens, key_heads = convolved.shape[0], keys // key_dim
    q, k, v = convolved.split_with_sizes([keys, keys, value_heads * value_dim], 1)
    return (
        q.view(tokens, key_heads, key_dim),
        k.view(tokens, key_heads, key_dim),
        v.view(tokens, value_heads, value_dim),
    )
