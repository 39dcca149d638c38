"""The definition of attention over a paged cache: one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import Backend
from qnext_kernels.elementwise import sigmoid


def read_cache(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The first ``length`` tokens [length, KV, D] of a sequence with these blocks [width]."""
    block_size = cache.shape[1]
    return cache[blocks[: -(-length // block_size)].long()].flatten(0, 1)[:length]


class ReferenceBackend(Backend):
    """Readable PyTorch, in float32 (float64 for float64 inputs)."""

    name = "reference"

    def attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
        scale: float,
        gate: Tensor | None,
        causal: bool,
        out: Tensor,
    ) -> None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        group = q.shape[1] // key_cache.shape[2]
        for n, (length, blocks) in enumerate(zip(seq_lens.tolist(), block_table, strict=True)):
            start, end = query_start_loc[n : n + 2].tolist()
            keys, values = (
                read_cache(cache, blocks, length).to(dtype).repeat_interleave(group, dim=1)
                for cache in (key_cache, value_cache)
            )
            for t in range(start, end):
                seen = length - (end - 1 - t) if causal else length
                weights = torch.softmax(scale * (keys[:seen] * q[t].to(dtype)).sum(dim=-1), dim=0)
                o = (weights[:, :, None] * values[:seen]).sum(dim=0)
                out[t] = o if gate is None else o * sigmoid(gate[t].to(dtype))

    def store_kv(self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
        block_size = key_cache.shape[1]
        for t, slot in enumerate(slot_mapping.tolist()):
            if slot >= 0:
                key_cache[slot // block_size, slot % block_size] = k[t]
                value_cache[slot // block_size, slot % block_size] = v[t]
