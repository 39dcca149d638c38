"""The recurrent states of a Gated DeltaNet layer, as a layer of vLLM's hybrid cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qnext_plugins.model import Qwen3NextConfig, RecurrentBatch, Segment, StatePools, VerifySegment
from qnext_plugins.model.gated_delta_net import gated_delta_net_core
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

    if metadata.spec_sequence_masks is None:
        decodes, prefills = metadata.num_decodes, metadata.num_prefills
        decode_tokens = metadata.num_decode_tokens
        batch = RecurrentBatch()
        if decodes:
            batch.decode = Segment(slice(0, decode_tokens), slots(metadata.non_spec_state_indices_tensor[:decodes]))
        if prefills:
            rows = slice(decodes, decodes + prefills)
            batch.prefill = Segment(
                slice(decode_tokens, decode_tokens + metadata.num_prefill_tokens),
                slots(metadata.non_spec_state_indices_tensor[rows]),
                metadata.non_spec_query_start_loc[decodes : decodes + prefills + 1] - decode_tokens,
                metadata.has_initial_state[rows],
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
    prefill = Segment(
        metadata.non_spec_token_indx,
        slots(metadata.non_spec_state_indices_tensor),
        metadata.non_spec_query_start_loc,
        metadata.has_initial_state,
    )
    return RecurrentBatch(prefill=prefill, verify=verify)


class StateBackend(api.GDNAttentionBackend):
    """vLLM's, for the metadata that it builds; the arithmetic is ours."""

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True


class GatedDeltaNetState(nn.Module, api.MambaBase):
    """Owns the slots of one layer; the shared model calls it as its recurrent core."""

    kv_cache: tuple[Tensor, Tensor]

    def __init__(self, config: Qwen3NextConfig, vllm_config: api.VllmConfig, *, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self._shapes, self._dtypes = state_shapes(config, vllm_config), state_dtypes(vllm_config)
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"duplicate layer name {prefix}")
        layers[prefix] = self

    @property
    def mamba_type(self) -> api.MambaAttentionBackendEnum:
        return api.MambaAttentionBackendEnum.GDN_ATTN

    def get_attn_backend(self) -> type[StateBackend]:
        return StateBackend

    def get_state_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._shapes

    def get_state_dtype(self) -> tuple[torch.dtype, torch.dtype]:
        return self._dtypes

    def forward(
        self, mixed_qkv: Tensor, a: Tensor, b: Tensor, conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor
    ) -> Tensor:
        return torch.ops.qnext.vllm_gated_delta_net(
            mixed_qkv, a, b, conv_weight, A_log, dt_bias, list(self._shapes[1][:2]), self.prefix
        )

    def run(
        self,
        metadata: api.GDNAttentionMetadata,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        conv_weight: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
    ) -> Tensor:
        """Run this batch on this layer's slots."""
        # The layers of a cache group share their metadata, so its translation is kept on it.
        batch = getattr(metadata, "_qnext_batch", None)
        if batch is None:
            batch = metadata._qnext_batch = recurrent_batch(metadata)
        conv_state, state = self.kv_cache
        if not api.is_conv_state_dim_first():
            conv_state = conv_state.transpose(1, 2)
        return gated_delta_net_core(mixed_qkv, a, b, conv_weight, A_log, dt_bias, StatePools(conv_state, state), batch)


def _core(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    head_shape: list[int],
    layer_name: str,
) -> Tensor:
    context = api.get_forward_context()
    if context.attn_metadata is None:  # a profiling run has no states
        return mixed_qkv.new_zeros(mixed_qkv.shape[0], *head_shape)
    layer = context.no_compile_layers[layer_name]
    return layer.run(context.attn_metadata[layer_name], mixed_qkv, a, b, conv_weight, A_log, dt_bias)


def _core_fake(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    head_shape: list[int],
    layer_name: str,
) -> Tensor:
    return mixed_qkv.new_empty(mixed_qkv.shape[0], *head_shape)


# Opaque to torch.compile: the batch's metadata and the slots come from vLLM's forward context.
_library = torch.library.Library("qnext", "FRAGMENT")
_library.define(
    "vllm_gated_delta_net(Tensor mixed_qkv, Tensor a, Tensor b, Tensor conv_weight, Tensor A_log, Tensor dt_bias, "
    "SymInt[] head_shape, str layer_name) -> Tensor"
)
_library.impl("vllm_gated_delta_net", _core, "CompositeExplicitAutograd")
torch.library.register_fake("qnext::vllm_gated_delta_net", _core_fake, lib=_library)
