"""The hash behind SGLang's seeded sampling, whose kernels are made for Triton and for AMX."""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def murmur_hash32(seed: Tensor, positions: Tensor, col_indices: Tensor) -> Tensor:
    """MurmurHash3 of (seed [N] 64 bits, position [N], column [M]): [N, M] uint32, the numbers of SGLang's kernel."""
    seed, positions, columns = (x.to(torch.int64) for x in (seed, positions, col_indices))
    state = torch.zeros_like(seed)
    for block in (seed & MASK, (seed >> 32) & MASK, positions & MASK):
        state = _mix(state, block)
    state = _mix(state[:, None], columns[None, :] & MASK) ^ 16
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & MASK
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & MASK
    return (state ^ (state >> 16)).to(torch.uint32)


def _mix(state: Tensor, block: Tensor) -> Tensor:
    """Products of two 32-bit numbers overflow int64, which leaves their low 32 bits as they are."""
    block = (_rotate((block * 0xCC9E2D51) & MASK, 15) * 0x1B873593) & MASK
    return (_rotate(state ^ block, 13) * 5 + 0xE6546B64) & MASK


def _rotate(x: Tensor, bits: int) -> Tensor:
    return ((x << bits) | (x >> (32 - bits))) & MASK
