"""Attention over a paged cache in C++ (``csrc/paged_attention.cpp``): one code for prefill, verify and decode."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from qnext_kernels.native import DTYPES, Indices, NativeBackend, function, pointer
from qnext_kernels.paged_attention.cpu import CpuBackend

_CACHE_STRIDES = ("key_block", "key_slot", "key_head", "value_block", "value_slot", "value_head")


class _Attention(ctypes.Structure):
    """``PagedAttention`` of the C++ file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "gate", "keys", "values", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "q_token", "q_head", "gate_token", "gate_head")),
        *((name, ctypes.c_int64) for name in _CACHE_STRIDES),
        ("block_table", Indices),
        ("table_row", ctypes.c_int64),
        ("seq_lens", Indices),
        ("query_start_loc", Indices),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "kv_heads", "head_dim", "block_size", "causal")),
        ("scale", ctypes.c_double),
    )


class _StoreKv(ctypes.Structure):
    """``StoreKv`` of the C++ file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k", "v", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("element_bytes", "k_token", "k_head", "v_token", "v_head")),
        *((name, ctypes.c_int64) for name in _CACHE_STRIDES),
        ("slots", Indices),
        *((name, ctypes.c_int64) for name in ("tokens", "kv_heads", "head_dim", "block_size")),
    )


@cache
def _attention() -> Callable[[_Attention], None]:
    return function("qnext_paged_attention", _Attention)


@cache
def _store_kv() -> Callable[[_StoreKv], None]:
    return function("qnext_store_kv", _StoreKv)


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
    ) -> Tensor:
        if not _reads(key_cache, value_cache):
            return super().attention(
                q, key_cache, value_cache, block_table, seq_lens, query_start_loc, scale, gate, causal
            )
        q, gate = _rows(q), None if gate is None else _rows(gate)
        block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
        seq_lens, query_start_loc = seq_lens.contiguous(), query_start_loc.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype)
        _attention()(
            _Attention(
                q=q.data_ptr(),
                gate=pointer(gate),
                keys=key_cache.data_ptr(),
                values=value_cache.data_ptr(),
                out=out.data_ptr(),
                dtype=DTYPES[q.dtype],
                q_token=q.stride(0),
                q_head=q.stride(1),
                gate_token=0 if gate is None else gate.stride(0),
                gate_head=0 if gate is None else gate.stride(1),
                **_cache_strides(key_cache, value_cache),
                block_table=Indices.of(block_table),
                table_row=block_table.stride(0),
                seq_lens=Indices.of(seq_lens),
                query_start_loc=Indices.of(query_start_loc),
                sequences=seq_lens.shape[0],
                heads=q.shape[1],
                kv_heads=key_cache.shape[2],
                head_dim=q.shape[2],
                block_size=key_cache.shape[1],
                causal=causal,
                scale=scale,
            )
        )
        return out

    def store_kv(self, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
        if not _reads(key_cache, value_cache):
            return super().store_kv(k, v, key_cache, value_cache, slot_mapping)
        k, v, slot_mapping = _rows(k), _rows(v), slot_mapping.contiguous()
        _store_kv()(
            _StoreKv(
                k=k.data_ptr(),
                v=v.data_ptr(),
                keys=key_cache.data_ptr(),
                values=value_cache.data_ptr(),
                element_bytes=k.element_size(),
                k_token=k.stride(0),
                k_head=k.stride(1),
                v_token=v.stride(0),
                v_head=v.stride(1),
                **_cache_strides(key_cache, value_cache),
                slots=Indices.of(slot_mapping),
                tokens=k.shape[0],
                kv_heads=k.shape[1],
                head_dim=k.shape[2],
                block_size=key_cache.shape[1],
            )
        )


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _reads(*caches: Tensor) -> bool:
    return all(cache.stride(-1) == 1 for cache in caches)


def _cache_strides(key_cache: Tensor, value_cache: Tensor) -> dict[str, int]:
    return dict(zip(_CACHE_STRIDES, (*key_cache.stride()[:3], *value_cache.stride()[:3]), strict=True))
