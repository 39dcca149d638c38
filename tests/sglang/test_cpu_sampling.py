"""The hash that seeds SGLang's sampling, against MurmurHash3 in Python's integers."""

from __future__ import annotations

import struct

import torch

from qnext_sglang.cpu.sampling import murmur_hash32

MASK = 0xFFFFFFFF


def murmur3(data: bytes) -> int:
    """MurmurHash3 for x86, 32 bits, seed 0, of whole blocks."""

    def rotate(x: int, bits: int) -> int:
        return ((x << bits) | (x >> (32 - bits))) & MASK

    state = 0
    for (block,) in struct.iter_unpack("<I", data):
        state ^= rotate(block * 0xCC9E2D51 & MASK, 15) * 0x1B873593 & MASK
        state = (rotate(state, 13) * 5 + 0xE6546B64) & MASK
    state ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        state = (state ^ (state >> shift)) * factor & MASK
    return state


def test_the_expected_hash_is_murmurhash3() -> None:
    assert murmur3(b"") == 0
    assert murmur3(bytes.fromhex("21436587")) == 0xF55B516B


def test_hash_of_seed_position_and_column_is_that_of_their_bytes() -> None:
    seeds = [0, 42, 2**31 + 5, 2**63 + 11, 2**64 - 1]
    positions, columns = [0, 7, 2**31, 262_143, 2**32 - 1], [0, 1, 77, 151_935]
    found = murmur_hash32(torch.tensor(seeds, dtype=torch.uint64), torch.tensor(positions), torch.tensor(columns))
    assert found.dtype == torch.uint32
    assert found.tolist() == [
        [murmur3(struct.pack("<QII", seed, position, column)) for column in columns]
        for seed, position in zip(seeds, positions, strict=True)
    ]
