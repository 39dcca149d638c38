"""Attention over a paged cache in C++ (``csrc/paged_attention.cpp``): one code for prefill, verify and decode."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from qnext_kernels.checks import expect_indices
from qnext_kernels.native import DTYPES, NativeBackend
from qnext_kernels.paged_attention.checks import check_values
from qnext_kernels.paged_attention.cpu import CpuBackend
from qnext_kernels.rows import indices, packed_function


class PagedAttentionNative(NativeBackend, CpuBackend):
    """Float32 throughout; every result has the same bits however tokens are split between calls.

    What it does not read (a cache whose head dim is not contiguous) runs in PyTorch.
    """

    name = "native"

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
        arguments = (q, key_cache, value_cache, block_table, seq_lens, query_start_loc)
        if not reads(key_cache, value_cache):
            return super().attention(*arguments, scale, gate, causal, out)
        q, gate = _rows(q), None if gate is None else _rows(gate)
        block_table = block_table if block_table.stride()[1] == 1 else block_table.contiguous()
        seq_lens, query_start_loc = seq_lens.contiguous(), query_start_loc.contiguous()
        gate_place, gate_strides = (0, (0, 0)) if gate is None else (gate.data_ptr(), gate.stride()[:2])
        tokens, heads, head_dim = q.shape
        blocks, block_size, kv_heads, _ = key_cache.shape
        if not _attention()(
            *(q.data_ptr(), gate_place, key_cache.data_ptr(), value_cache.data_ptr(), out.data_ptr()),
            *(DTYPES[q.dtype], *q.stride()[:2], *gate_strides),
            *(*key_cache.stride()[:3], *value_cache.stride()[:3]),
            *(*indices(block_table), block_table.stride()[0], *indices(seq_lens), *indices(query_start_loc)),
            *(seq_lens.shape[0], heads, kv_heads, head_dim, block_size, causal),
            *(tokens, blocks, block_table.shape[1], scale),
        ):
            check_values(block_table, seq_lens, query_start_loc, tokens, blocks, block_size)

    def store_kv(self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
        if not reads(key_cache, value_cache):
            return super().store_kv(k, v, key_cache, value_cache, slot_mapping)
        k, v, slot_mapping = _rows(k), _rows(v), slot_mapping.contiguous()
        blocks, block_size = key_cache.shape[:2]
        if not _store_kv()(
            *(k.data_ptr(), v.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr()),
            *(k.element_size(), *k.stride()[:2], *v.stride()[:2]),
            *(*key_cache.stride()[:3], *value_cache.stride()[:3]),
            *(*indices(slot_mapping), *k.shape, block_size, blocks),
        ):
            expect_indices("slot_mapping", slot_mapping, -1, blocks * block_size)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride()[-1] == 1 else x.contiguous()


def reads(key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether the kernel reads caches of these strides; it then checks the values of indices itself."""
    return key_cache.stride()[-1] == 1 and value_cache.stride()[-1] == 1


PAGED_ATTENTION, STORE_KV = "32qd", "22q"
"""The structs' fields, as in :mod:`struct`."""
_attention = cache(lambda: packed_function("qnext_paged_attention", PAGED_ATTENTION))
_store_kv = cache(lambda: packed_function("qnext_store_kv", STORE_KV))
