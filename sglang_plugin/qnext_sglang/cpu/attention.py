"""Full attention over SGLang's paged cache on a CPU, with PyTorch's scaled_dot_product_attention.

One function serves prefill, decode, verification and drafts: a query at position p sees its sequence's keys 0 to p.
SGLang's own ``torch_native`` backend has no verification and no drafts.
"""

from __future__ import annotations

from typing import Any

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


class CpuAttentionBackend(AttentionBackend):
    """Sequence by sequence, so that a sequence's result does not depend on the rest of the batch."""

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self._ranges: list[tuple[int, int]] = []
        self._slots: list[Tensor] = []
        self._masks: list[Tensor | None] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Find each sequence's tokens, the cache slots of its keys, and its mask, once for all layers."""
        positions, mode = forward_batch.positions, forward_batch.forward_mode
        count = forward_batch.batch_size
        uniform = mode.is_decode() or mode.is_target_verify() or forward_batch.extend_seq_lens is None
        # Uniform: one token to decode, or a sequence's last accepted one and its drafts.
        lengths = [len(positions) // max(1, count)] * count if uniform else forward_batch.extend_seq_lens.tolist()
        self._ranges, self._slots, self._masks = [], [], []
        start = 0
        for request, length in zip(forward_batch.req_pool_indices.tolist(), lengths, strict=False):
            own = positions[start : start + length]
            keys = int(own[-1]) + 1 if length else 0
            self._ranges.append((start, start + length))
            self._slots.append(self.req_to_token_pool.req_to_token[request, :keys].long())
            self._masks.append(torch.arange(keys) <= own[:, None] if length > 1 else None)
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
        for (start, end), slots, mask in zip(self._ranges, self._slots, self._masks, strict=True):
            if start == end:
                continue
            attended = scaled_dot_product_attention(
                q[start:end].transpose(0, 1)[None],
                keys[slots].transpose(0, 1)[None].to(q.dtype),
                values[slots].transpose(0, 1)[None].to(q.dtype),
                attn_mask=mask,
                scale=layer.scaling,
                enable_gqa=True,
            )
            out[start:end] = attended[0].transpose(0, 1)
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
