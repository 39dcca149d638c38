"""Vectorised PyTorch: each sequence's keys and values gathered, then scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qnext_kernels.dispatch import Backend, refuse_if_deterministic
from qnext_kernels.elementwise import sigmoid
from qnext_kernels.paged_attention.reference import read_cache

SINGLE_TOKENS = 8
"""Up to so many new tokens of a sequence attend one by one, so that a verified token has the bits of a decoded one."""


class CpuBackend(Backend):
    """Float32 (float64 for float64 inputs), sequence by sequence, so that none depends on the rest of the batch."""

    name = "cpu"
    devices = ("cpu",)

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
        refuse_if_deterministic("paged_attention", "PyTorch's attention")
        dtype = torch.promote_types(q.dtype, torch.float32)
        offsets = query_start_loc.tolist()
        for n, length in enumerate(seq_lens.tolist()):
            start, end = offsets[n : n + 2]
            if start == end:
                continue
            keys, values = (
                read_cache(cache, block_table[n], length).to(dtype).transpose(0, 1)[None]
                for cache in (key_cache, value_cache)
            )
            step = 1 if end - start <= SINGLE_TOKENS else end - start
            for first in range(start, end, step):
                tokens = slice(first, first + step)
                seen = length - (end - first - step) if causal else length
                mask = torch.ones(step, seen, dtype=torch.bool).tril(seen - step) if causal and step > 1 else None
                o = scaled_dot_product_attention(
                    q[tokens].to(dtype).transpose(0, 1)[None],
                    keys[:, :, :seen],
                    values[:, :, :seen],
                    attn_mask=mask,
                    scale=scale,
                    enable_gqa=True,
                )[0].transpose(0, 1)
                out[tokens] = o if gate is None else o * sigmoid(gate[tokens].to(dtype))

    def store_kv(self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
        tokens = (slot_mapping >= 0).nonzero().squeeze(1)
        slots = slot_mapping[tokens].long()
        blocks, positions = slots // key_cache.shape[1], slots % key_cache.shape[1]
        key_cache[blocks, positions] = k[tokens]
        value_cache[blocks, positions] = v[tokens]
