"""Full attention over vLLM's paged cache on a CPU, on our kernel: a verified token has the bits of a decoded one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext_kernels import OPERATIONS, paged_attention, store_kv
from qnext_vllm import vllm_api as api


class QnextAttentionImpl(api.CPUAttentionBackendImpl):
    """The cache is vLLM's: [blocks, kv_heads, block_size, 2·head_dim]."""

    _cache: Tensor | None = None
    _views: tuple[Tensor, Tensor]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None:  # vLLM measures memory without a cache
            return output
        tokens, slots, out = attn_metadata.num_actual_tokens, attn_metadata.slot_mapping, output
        if tokens != query.shape[0]:  # behind them is padding
            query, key, value, slots, out = (x[:tokens] for x in (query, key, value, slots, output))
        if kv_cache is not self._cache:
            self._cache, self._views = kv_cache, keys_and_values(kv_cache)
        store_kv(key, value, *self._views, slots)
        paged_attention(
            query,
            *self._views,
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            self.scale,
            causal=attn_metadata.causal,
            out=out,
        )
        return output


class QnextAttentionBackend(api.CPUAttentionBackend):
    """vLLM's CPU backend with our arithmetic; its name, cache and metadata stay vLLM's."""

    forward_includes_kv_cache_update = True
    """One operator a layer instead of two: each costs more than it takes to store a token."""

    @staticmethod
    def get_impl_cls() -> type[QnextAttentionImpl]:
        return QnextAttentionImpl

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True


def attention_backend(cache_dtype: str, dtype: torch.dtype, device: torch.device) -> type[QnextAttentionBackend] | None:
    """Our backend where our kernel serves and the cache holds what the model computes with, else None: vLLM's own."""
    serves = device.type == "cpu" and OPERATIONS["paged_attention"].select(device, dtype).name == "native"
    return QnextAttentionBackend if stores_model_dtype(cache_dtype, dtype) and serves else None


def stores_model_dtype(cache_dtype: str, dtype: torch.dtype) -> bool:
    """Whether the cache holds what the model computes with."""
    return cache_dtype == "auto" or getattr(torch, cache_dtype, None) == dtype


def keys_and_values(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views [blocks, block_size, kv_heads, head_dim] of vLLM's cache, where a head's keys lie before its values."""
    blocks, heads, block_size, _ = kv_cache.shape
    halves = kv_cache.view(blocks, heads, 2, block_size, -1).transpose(1, 3)
    return halves[:, :, 0], halves[:, :, 1]
