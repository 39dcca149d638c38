"""The recurrent states of a Gated DeltaNet layer, as a layer of vLLM's hybrid cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qnext_kernels import use_huge_pages
from qnext_kernels.gated_delta_rule import CHUNK_SIZE
from qnext_kernels.memory import SECONDS_FOR_HUGE_PAGES
from qnext_plugins.model import CoreWeights, Qwen3NextConfig, RecurrentBatch, Segment, StatePools, VerifySegment
from qnext_plugins.model.gated_delta_net import GatedDeltaNetCore
from qnext_vllm import vllm_api as api


def state_shapes(config: Qwen3NextConfig, vllm_config: api.VllmConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one slot: convolution [W − 1 + drafts, channels] (or transposed) and recurrent state [HV, V, K]."""
    speculative = vllm_config.speculative_config
    return api.MambaStateShapeCalculator.gated_delta_net_state_shape(
        vllm_config.parallel_config.tensor_parallel_size,
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        config.linear_conv_kernel_dim,
        speculative.num_speculative_tokens if speculative else 0,
    )


def state_dtypes(vllm_config: api.VllmConfig) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of convolution state and recurrent state; the latter is float32 unless the user chose one."""
    cache = vllm_config.cache_config
    recurrent = "float32" if cache.mamba_ssm_cache_dtype == "auto" else cache.mamba_ssm_cache_dtype
    return api.MambaStateDtypeCalculator.gated_delta_net_state_dtype(
        vllm_config.model_config.dtype, cache.mamba_cache_dtype, recurrent
    )


def recurrent_batch(metadata: api.GDNAttentionMetadata) -> RecurrentBatch:
    """Translate vLLM's metadata; its block 0 is padding, which is slot −1 here."""

    def slots(blocks: Tensor) -> Tensor:
        return torch.where(blocks == api.NULL_BLOCK_ID, -1, blocks)

    def prefill_segment(tokens: slice | Tensor, rows: slice, starts: Tensor) -> Segment:
        blocks, known = metadata.non_spec_state_indices_tensor[rows], metadata.has_initial_state[rows]
        segment, checkpoint = Segment(tokens, slots(blocks), starts, known), metadata.checkpoint
        if checkpoint is not None:
            # A row without one has no block.
            segment.snapshot_slots = slots(checkpoint.state_indices[rows])
            segment.snapshot_lengths = checkpoint.checkpoint_offsets[rows]
        return segment

    if metadata.spec_sequence_masks is None:
        decodes, prefills = metadata.num_decodes, metadata.num_prefills
        decode_tokens = metadata.num_decode_tokens
        batch = RecurrentBatch()
        if decodes:
            # One token each; requests that vLLM has padded the batch with come last and have none.
            blocks = metadata.non_spec_state_indices_tensor[:decode_tokens]
            batch.decode = Segment(slice(0, decode_tokens), slots(blocks))
        if prefills:
            batch.prefill = prefill_segment(
                slice(decode_tokens, decode_tokens + metadata.num_prefill_tokens),
                slice(decodes, decodes + prefills),
                metadata.non_spec_query_start_loc[decodes : decodes + prefills + 1] - decode_tokens,
            )
        return batch

    count = metadata.num_spec_decodes
    blocks = metadata.spec_state_indices_tensor[:count]
    verify = VerifySegment(
        slice(0, metadata.num_spec_decode_tokens),
        slots(blocks),
        metadata.spec_query_start_loc[: count + 1],
        metadata.num_accepted_tokens[:count].clamp(1, blocks.shape[1]),
    )
    if not metadata.num_prefills:
        return RecurrentBatch(verify=verify)
    # Beside speculating sequences, vLLM counts a plain decode as a prefill of one token: the same recurrence serves it.
    verify.tokens = metadata.spec_token_indx
    prefill = prefill_segment(metadata.non_spec_token_indx, slice(None), metadata.non_spec_query_start_loc)
    return RecurrentBatch(prefill=prefill, verify=verify)


class StateBackend(api.GDNAttentionBackend):
    """vLLM's, for the metadata that it builds; the arithmetic is ours."""

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True


class GatedDeltaNetState(nn.Module, api.MambaBase):
    """Owns the slots of one layer; the shared model calls it as its recurrent core."""

    kv_cache: tuple[Tensor, Tensor]
    _moved = 0  # the address of the memory that is on huge pages

    def __init__(self, config: Qwen3NextConfig, vllm_config: api.VllmConfig, *, prefix: str) -> None:
        super().__init__()
        self.prefix, self._core = prefix, GatedDeltaNetCore(config.rms_norm_eps)
        self._shapes, self._dtypes = state_shapes(config, vllm_config), state_dtypes(vllm_config)
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"duplicate layer name {prefix}")
        layers[prefix] = self
        split_where_vllm_does(vllm_config.compilation_config)

    @property
    def mamba_type(self) -> api.MambaAttentionBackendEnum:
        return api.MambaAttentionBackendEnum.GDN_ATTN

    def get_attn_backend(self) -> type[StateBackend]:
        return StateBackend

    def get_kv_cache_spec(self, vllm_config: api.VllmConfig) -> Any:
        """vLLM's, with a further block a prefill, for the state at the last boundary that the prefix cache keeps.

        vLLM then runs a prompt through it in one step. It would end a step there otherwise.
        """
        spec = super().get_kv_cache_spec(vllm_config)
        return replace(spec, num_prefill_checkpoint_blocks=1, prefill_checkpoint_alignment=CHUNK_SIZE)

    def get_prefill_checkpoint_alignment(self) -> int:
        """Of what vLLM 0.33 makes its blocks a multiple."""
        return CHUNK_SIZE

    def get_state_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._shapes

    def get_state_dtype(self) -> tuple[torch.dtype, torch.dtype]:
        return self._dtypes

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """As vLLM does. On a CPU its memory, one for all layers, attention's too, goes onto huge pages."""
        memory = kv_cache.untyped_storage().data_ptr()
        if memory != GatedDeltaNetState._moved:
            # vLLM has written it: it is copied, slowly where a virtual machine gets its memory only now.
            use_huge_pages(kv_cache, seconds=SECONDS_FOR_HUGE_PAGES)
            GatedDeltaNetState._moved = memory
        super().bind_kv_cache(kv_cache)

    def forward(self, qkvz: Tensor, ba: Tensor, weights: CoreWeights) -> Tensor:
        _, (value_heads, value_dim, _) = self._shapes
        # Made here, in a CUDA graph: the graph behind the operator reads this very memory at each replay.
        out = qkvz.new_empty(qkvz.shape[0], value_heads * value_dim)
        torch.ops.qnext.vllm_gated_delta_net(qkvz, ba, *weights, out, self.prefix)
        return out

    def run(self, batch: RecurrentBatch, qkvz: Tensor, ba: Tensor, weights: CoreWeights, out: Tensor) -> None:
        """Run this batch on this layer's slots; ``out`` [T, HV · V] is written."""
        self._core(qkvz, ba, weights, StatePools(*self.pools), batch, out)

    @property
    def pools(self) -> tuple[Tensor, Tensor]:
        """States of the convolution [slots, channels, state_len] and of the rule [slots, HV, V, K]."""
        conv_state, state = self.kv_cache
        return conv_state if api.is_conv_state_dim_first() else conv_state.transpose(1, 2), state


def batch_of(context: api.ForwardContext, metadata: api.GDNAttentionMetadata) -> RecurrentBatch:
    """``metadata`` translated, once in a forward pass for all layers that share it.

    It is kept with the pass and not with the metadata, which may outlive it: the translation must be among what a CUDA
    graph captures, so that a replay translates what the metadata's tensors hold by then.
    """
    batches = context.additional_kwargs.setdefault("qnext_batches", {})
    if id(metadata) not in batches:
        batches[id(metadata)] = recurrent_batch(metadata)
    return batches[id(metadata)]


OPERATOR = "qnext::vllm_gated_delta_net"
VLLMS_OPERATOR = "vllm::qwen_gdn_attention_core"
"""What our operator stands for in vLLM's own model."""


def split_where_vllm_does(compilation_config: Any) -> None:
    """Have vLLM split its graphs at our operator where it splits them at its own: it then runs between CUDA graphs."""
    splitting = compilation_config.splitting_ops or []
    if VLLMS_OPERATOR in splitting and OPERATOR not in splitting:
        splitting.append(OPERATOR)


@api.eager_break_during_capture
def _core(
    qkvz: Tensor,
    ba: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    out: Tensor,
    layer_name: str,
) -> None:
    context = api.get_forward_context()
    metadata = (context.attn_metadata or {}).get(layer_name)
    if metadata is None:  # a profiling run has no states
        out.zero_()
        return
    layer = context.no_compile_layers[layer_name]
    weights = CoreWeights(conv_weight, A_log, dt_bias, norm_weight)
    layer.run(batch_of(context, metadata), qkvz, ba, weights, out)


# Opaque to torch.compile: the batch's metadata and the slots come from vLLM's forward context.
_library = torch.library.Library("qnext", "FRAGMENT")
_library.define(
    "vllm_gated_delta_net(Tensor qkvz, Tensor ba, Tensor conv_weight, Tensor A_log, Tensor dt_bias, "
    "Tensor norm_weight, Tensor(a!) out, str layer_name) -> ()"
)
_library.impl("vllm_gated_delta_net", _core, "CompositeExplicitAutograd")
torch.library.register_fake(OPERATOR, lambda *args: None, lib=_library)
