"""Attention over a paged cache of keys and values, for ragged batches: prefill, verify and decode in one function.

A token at position p of its sequence reads keys 0 to p (all of the sequence's, unless causal); query head h reads
key-value head h // (H / KV):

    o = Σ_j softmax_j(scale · q · k_j) v_j,   then o ← o · sigmoid(gate) where there is a gate

Computed in float32, rounded once. In C++ a token's result has the same bits in a prefill, however it is chunked, in a
verify and in a decode, and does not depend on the rest of the batch. In PyTorch that holds for up to
:data:`~qnext_kernels.paged_attention.cpu.SINGLE_TOKENS` tokens a sequence and call.

The cache is two tensors of any strides with the head dim contiguous, so that both layouts of the engines are views of
it: [blocks, block_size, KV, D] is read where a block lies heads first, slots first, or keys beside values; a pool of
single slots [slots, KV, D] is one of block size 1 (``pool.unsqueeze(1)``), its table the slots of each position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.checks import (
    INTEGERS,
    expect_destination,
    expect_dtype,
    expect_floating,
    expect_indices,
    expect_shape,
)
from qnext_kernels.dispatch import Backend, Operation
from qnext_kernels.paged_attention.checks import check_values
from qnext_kernels.paged_attention.cpu import CpuBackend
from qnext_kernels.paged_attention.native import PagedAttentionNative, reads
from qnext_kernels.paged_attention.reference import ReferenceBackend

operation = Operation("paged_attention", [PagedAttentionNative(), CpuBackend(), ReferenceBackend()])


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    gate: Tensor | None = None,
    causal: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of each sequence's new tokens, the last of its tokens in the cache.

    Args:
        q: [T, H, D], any float dtype.
        key_cache, value_cache: [blocks, block_size, KV, D] in the dtype of ``q``, H a multiple of KV. What no sequence
            has a token for is not read.
        block_table: [N, width] int32 or int64: row n holds the blocks of sequence n in order; entries behind its
            tokens may be anything.
        seq_lens: [N] int32 or int64, tokens in the cache, the new ones among them.
        query_start_loc: [N + 1] int32 or int64, where the new tokens of each sequence start in ``q``.
        scale: of the scores.
        gate: [T, H, D] in the dtype of ``q``; the result is multiplied by its sigmoid.
        causal: a token reads no later ones.
        out: [T, H, D] in the dtype of ``q``, contiguous, where the result is written; overlaps nothing else.

    Returns:
        [T, H, D] in the dtype of ``q``, contiguous; ``out`` where it is given.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit.
    """
    expect_shape("q", q, (None, None, None))
    expect_floating("q", q)
    num_tokens, num_heads, head_dim = q.shape
    _check_caches(key_cache, value_cache, head_dim, q.dtype)
    num_blocks, block_size, num_kv_heads, _ = key_cache.shape
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"q: expected a multiple of {num_kv_heads} heads (the key-value heads), got {num_heads}")
    expect_shape("query_start_loc", query_start_loc, (None,))
    num_sequences = query_start_loc.shape[0] - 1
    if num_sequences < 0:
        raise ValueError("query_start_loc: expected at least one offset, got none")
    expect_shape("block_table", block_table, (num_sequences, None))
    expect_shape("seq_lens", seq_lens, (num_sequences,))
    for name, index in (("block_table", block_table), ("seq_lens", seq_lens), ("query_start_loc", query_start_loc)):
        expect_dtype(name, index, INTEGERS)
    if gate is not None:
        expect_shape("gate", gate, q.shape)
        expect_dtype("gate", gate, (q.dtype,))
    if out is None:
        out = q.new_empty(q.shape)
    else:
        expect_destination("out", out, q.shape, q.dtype)
    backend, where = operation.select(q.device, q.dtype), (block_table, seq_lens, query_start_loc)
    if not _native_reads(backend, key_cache, value_cache):
        check_values(*where, num_tokens, num_blocks, block_size)
    backend.attention(q, key_cache, value_cache, *where, scale, gate, causal, out)
    return out


def store_kv(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write keys and values of new tokens into the cache.

    Args:
        k, v: [T, KV, D], any float dtype.
        key_cache, value_cache: [blocks, block_size, KV, D] in the dtype of ``k``, written in place.
        slot_mapping: [T] int32 or int64, block · block_size + position in the block; −1 is skipped. Undefined where
            two tokens have one slot.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; nothing has been written.
    """
    expect_shape("k", k, (None, None, None))
    expect_floating("k", k)
    expect_shape("v", v, k.shape)
    expect_dtype("v", v, (k.dtype,))
    _check_caches(key_cache, value_cache, k.shape[2], k.dtype)
    if key_cache.shape[2] != k.shape[1]:
        raise ValueError(f"k: expected {key_cache.shape[2]} key-value heads, got {k.shape[1]}")
    expect_shape("slot_mapping", slot_mapping, (k.shape[0],))
    expect_dtype("slot_mapping", slot_mapping, INTEGERS)
    backend = operation.select(k.device, k.dtype)
    if not _native_reads(backend, key_cache, value_cache):
        expect_indices("slot_mapping", slot_mapping, -1, key_cache.shape[0] * key_cache.shape[1])
    backend.store_kv(k, v, key_cache, value_cache, slot_mapping)


def _native_reads(backend: Backend, key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether these caches are read by the C++ kernel, which checks the values of its indices itself."""
    return isinstance(backend, PagedAttentionNative) and reads(key_cache, value_cache)


def _check_caches(key_cache: Tensor, value_cache: Tensor, head_dim: int, dtype: torch.dtype) -> None:
    expect_shape("key_cache", key_cache, (None, None, None, head_dim))
    expect_dtype("key_cache", key_cache, (dtype,))
    if key_cache.shape[1] == 0:
        raise ValueError(f"key_cache: expected blocks of at least one slot, got shape {list(key_cache.shape)}")
    expect_shape("value_cache", value_cache, key_cache.shape)
    expect_dtype("value_cache", value_cache, (dtype,))
