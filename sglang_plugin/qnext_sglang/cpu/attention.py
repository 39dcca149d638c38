"""Full attention over SGLang's paged cache on a CPU, with PyTorch's scaled_dot_product_attention.

One function serves prefill, decode, verification and drafts: a query at position p sees its sequence's keys 0 to p.
SGLang's own ``torch_native`` backend has no verification and no drafts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool, move_kv_cache_native
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qnext_sglang.cpu.platform import ATTENTION_BACKEND


class CpuKVPool(MHATokenToKVPool):
    """SGLang's pool of keys and values, moved by PyTorch instead of Triton."""

    def _init_kv_copy_and_warmup(self) -> None:
        self._kv_copy_config = None

    def _move_kv_cache_impl(self, tgt_loc: Tensor, src_loc: Tensor) -> None:
        move_kv_cache_native(self.k_buffer, self.v_buffer, tgt_loc, src_loc)


class Run(NamedTuple):
    """Tokens of one sequence that attend together."""

    tokens: slice
    slots: Tensor
    """[keys], where its keys and values lie."""
    mask: Tensor | None
    """[tokens, keys] bool; None: every key."""


class CpuAttentionBackend(AttentionBackend):
    """Sequence by sequence, so that a sequence's result does not depend on the rest of the batch."""

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self._runs: list[Run] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Find each run's tokens, the cache slots of its keys, and its mask, once for all layers."""
        positions, mode = forward_batch.positions, forward_batch.forward_mode
        requests = forward_batch.req_pool_indices.tolist()
        if mode.is_decode() or mode.is_target_verify() or forward_batch.extend_seq_lens is None:
            # Query by query: a verified token then has the bits of a decoded one.
            tokens = len(positions) // max(1, len(requests))
            requests, lengths = [request for request in requests for _ in range(tokens)], [1] * len(positions)
        else:
            lengths = forward_batch.extend_seq_lens.tolist()
        self._runs = []
        start = 0
        for request, length in zip(requests, lengths, strict=False):
            if length:
                own = positions[start : start + length]
                keys = int(own[-1]) + 1
                slots = self.req_to_token_pool.req_to_token[request, :keys].long()
                mask = torch.arange(keys) <= own[:, None] if length > 1 else None
                self._runs.append(Run(slice(start, start + length), slots, mask))
            start += length

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def support_triton(self) -> bool:
        return False

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> Tensor:
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> Tensor:
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool) -> Tensor:
        """Map q [T, heads·D], k and v [T, kv_heads·D] to [T, heads·D]; rows of padding are zero."""
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.zeros_like(q)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        for run in self._runs:
            attended = scaled_dot_product_attention(
                q[run.tokens].transpose(0, 1)[None],
                keys[run.slots].transpose(0, 1)[None].to(q.dtype),
                values[run.slots].transpose(0, 1)[None].to(q.dtype),
                attn_mask=run.mask,
                scale=layer.scaling,
                enable_gqa=True,
            )
            out[run.tokens] = attended[0].transpose(0, 1)
        return out.flatten(1)


class _DraftStepBackend(CpuAttentionBackend):
    """SGLang moves the batch's positions on between the steps and announces only the first."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool) -> Tensor:
        self.init_forward_metadata(forward_batch)
        return super()._attend(q, k, v, layer, forward_batch, save_kv_cache)


class CpuMultiStepBackend:
    """One backend for each draft step."""

    def __init__(self, runner: Any, steps: int) -> None:
        self.attn_backends = [_DraftStepBackend(runner) for _ in range(steps)]
        self.prefill_attention_backend_str = self.decode_attention_backend_str = ATTENTION_BACKEND

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Nothing: each step finds its own."""
