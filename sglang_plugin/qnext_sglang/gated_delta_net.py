"""The Gated DeltaNet attention backend: SGLang's pool of recurrent states and its metadata, our kernels.

SGLang's base class owns the metadata, its static buffers for CUDA graphs included; here it becomes the shared model's
:class:`~qnext_plugins.model.RecurrentBatch`, once a batch. Whatever a captured graph reads is a view of those buffers
or a constant, never a tensor made outside the graph. A prefill is never captured: SGLang's graphs break around it, and
hand it the tokens without their padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext_plugins.model import RecurrentBatch, Segment, StatePools, VerifySegment
from qnext_sglang import sglang_api as api


class GatedDeltaNetBackend(api.MambaAttnBackendBase):
    """Serves decode, prefill (with snapshots for the prefix cache) and verification of a chain of drafts.

    A verify reads the states and writes those behind every token to SGLang's step pools, from where SGLang commits the
    accepted one.
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        pool = self.req_to_token_pool
        self.conv_states_shape = pool.mamba_pool.mamba_cache.conv[0].shape
        self.verify_rows = api.build_verify_intermediate_state_indices(pool.size, self.device)
        self._one_accepted = torch.ones_like(self.verify_rows)

    @property
    def batch(self) -> RecurrentBatch:
        """Who does what in the present batch; it lies with the metadata, which SGLang keeps and puts back."""
        return self.forward_metadata.qnext_batch

    def init_forward_metadata(self, forward_batch: api.ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self.forward_metadata.qnext_batch = self._recurrent_batch(forward_batch, forward_batch.logical_forward_mode)

    def init_forward_metadata_out_graph(self, forward_batch: api.ForwardBatch, in_capture: bool = False) -> None:
        super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        self.forward_metadata.qnext_batch = self._recurrent_batch(forward_batch, forward_batch.forward_mode)

    def forward_decode(self, layer: Any = None, forward_batch: Any = None, **inputs: Any) -> Tensor:
        out = self._run(layer, **inputs)
        self.track(layer.layer_id, forward_batch)
        return out

    def track(self, layer_id: int, forward_batch: Any) -> None:
        """Keep the states behind a decode where SGLang's prefix cache is to have them."""
        cache = self.req_to_token_pool.mamba2_layer_cache(layer_id)
        slots = self.forward_metadata.mamba_cache_indices
        self._track_mamba_state_decode(forward_batch, cache.conv[0], cache.temporal, slots, layer_id)

    def forward_extend(self, layer: Any = None, forward_batch: Any = None, **inputs: Any) -> Tensor:
        return self._run(layer, **inputs)

    def _run(self, layer: Any, *, mixed_qkv: Tensor, a: Tensor, **_: Any) -> Tensor:
        """Map the projections of this batch (see ``RecurrentState``) to [1, T, HV, V]."""
        cache = self.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        pools = StatePools(cache.conv[0], cache.temporal)
        if self.batch.verify is not None:
            pools.conv_steps, pools.recurrent_steps = cache.intermediate_conv_window[0], cache.intermediate_ssm
        out = layer.qnext_core(mixed_qkv, a, layer.qnext_weights, pools, self.batch)
        return out.view(1, out.shape[0], layer.num_v_heads, layer.head_v_dim)

    def _recurrent_batch(self, forward_batch: api.ForwardBatch, mode: Any) -> RecurrentBatch:
        metadata = self.forward_metadata
        slots, starts = metadata.mamba_cache_indices, metadata.query_start_loc
        if starts is None or mode.is_idle():  # a draft model, whose layers are full attention; or a rank without work
            return RecurrentBatch()
        count = starts.shape[0] - 1
        slots = slots[:count]
        if mode.is_decode():
            return RecurrentBatch(decode=Segment(slice(0, count), slots))
        if mode.is_target_verify():
            rows, accepted = self.verify_rows[:count], self._one_accepted[:count]
            everything = slice(None)
            return RecurrentBatch(verify=VerifySegment(everything, slots[:, None], starts, accepted, rows))
        prefill = Segment(slice(None), slots, starts, forward_batch.extend_prefix_lens > 0)
        if metadata.has_mamba_track_mask:
            lengths, mask = forward_batch.mamba_track_aligned_lens(), forward_batch.mamba_track_mask
            prefill.snapshot_slots = torch.where(mask, forward_batch.mamba_track_indices, -1)
            prefill.snapshot_lengths = lengths
        return RecurrentBatch(prefill=prefill)


def wrap_attention(runner: Any, full_attention: Any) -> Any:
    """SGLang's hybrid of ``full_attention`` and our Gated DeltaNet backend for the model of ``runner``."""
    if torch.device(runner.device).type == "cpu":
        from qnext_sglang.cpu.gated_delta_net import CpuGatedDeltaNetBackend, CpuHybridBackend

        linear_class, hybrid_class = CpuGatedDeltaNetBackend, CpuHybridBackend
    else:
        linear_class, hybrid_class = GatedDeltaNetBackend, api.HybridLinearAttnBackend
    config = api.hybrid_gdn_config(runner.model_config)
    # The draft has one layer, full attention.
    full_layers = [0] if runner.is_draft_worker else config.full_attention_layer_ids
    return hybrid_class(full_attention, linear_class(runner), full_layers)
