"""Full attention over SGLang's paged cache on a CPU, on our kernel.

One function serves prefill, decode, verification and drafts: a query at position p sees its sequence's keys 0 to p.
SGLang's own ``torch_native`` backend has no verification and no drafts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool, move_kv_cache_native
from torch import Tensor

from qnext_kernels import paged_attention, use_huge_pages
from qnext_sglang.cpu.platform import ATTENTION_BACKEND


class CpuKVPool(MHATokenToKVPool):
    """SGLang's pool of keys and values, moved by PyTorch instead of Triton.

    With pages, [slots, heads, D] is a view of [heads, slots, D]: attention reads one head after the other, and what it
    reads of a page then lies in a row.
    """

    k_buffer: list[Tensor]
    v_buffer: list[Tensor]

    def _create_buffers_normal(self) -> None:
        super()._create_buffers_normal()
        if self.page_size > 1:
            self.k_buffer = [_heads_first(keys) for keys in self.k_buffer]
            self.v_buffer = [_heads_first(values) for values in self.v_buffer]
        for buffer in (*self.k_buffer, *self.v_buffer):
            use_huge_pages(buffer, seconds=0)  # no copies: SGLang has not written to it yet

    def _init_kv_copy_and_warmup(self) -> None:
        self._kv_copy_config = None

    def _move_kv_cache_impl(self, tgt_loc: Tensor, src_loc: Tensor) -> None:
        move_kv_cache_native(self.k_buffer, self.v_buffer, tgt_loc, src_loc)


def _heads_first(zeros: Tensor) -> Tensor:
    """[slots, heads, D] over the same memory, a head behind the other."""
    slots, heads, dim = zeros.shape
    return zeros.view(heads, slots, dim).transpose(0, 1)


class Batch(NamedTuple):
    """The sequences that attend, with the tokens that they attend for."""

    slots: Tensor
    """[N, longest] int32, where the keys and values of each sequence lie."""
    seq_lens: Tensor
    query_start_loc: Tensor
    tokens: int
    """How many of the batch's rows; padding follows."""


class CpuAttentionBackend(AttentionBackend):
    """The kernel reads SGLang's pool as a cache with blocks of one slot."""

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.batch: Batch | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Find each sequence's tokens and the cache slots of its keys, once for all layers."""
        positions, mode = forward_batch.positions, forward_batch.forward_mode
        requests = forward_batch.req_pool_indices
        if mode.is_decode() or mode.is_target_verify() or forward_batch.extend_seq_lens is None:
            lengths = torch.full((len(requests),), len(positions) // max(1, len(requests)))
        else:
            lengths = forward_batch.extend_seq_lens.long()
        requests, lengths = requests[lengths > 0], lengths[lengths > 0]
        ends = lengths.cumsum(0)
        tokens = int(ends[-1]) if len(ends) else 0
        seq_lens = positions[ends - 1] + 1
        slots = self.req_to_token_pool.req_to_token[requests, : int(seq_lens.max()) if tokens else 0]
        self.batch = Batch(slots, seq_lens, torch.nn.functional.pad(ends, (1, 0)), tokens)

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
        batch = self.batch
        if batch is not None and batch.tokens:
            keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)[:, None]
            values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)[:, None]
            queries = q[: batch.tokens].to(keys.dtype)
            where = (batch.slots, batch.seq_lens, batch.query_start_loc)
            out[: batch.tokens] = paged_attention(queries, keys, values, *where, layer.scaling).to(q.dtype)
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
