"""The decoder layers as one operator of vLLM's graph on a CPU: a step without prefills is one call of C++."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qnext_kernels.decoder_layer.stack import AttentionStep, DecoderStack
from qnext_plugins.model import DecoderLayer, Engine
from qnext_plugins.model.config import FULL_ATTENTION
from qnext_plugins.model.decoder_stack import STACKED, LayerCache, delta_net_step, stack_layers
from qnext_plugins.packed_methods import weights_version
from qnext_vllm import logger
from qnext_vllm import vllm_api as api
from qnext_vllm.attention import QnextAttentionBackend, keys_and_values
from qnext_vllm.gated_delta_net import batch_of


def stacks_layers(vllm_config: api.VllmConfig) -> bool:
    """Whether the layers of a model may run as one operator: on a CPU, on one rank, and with no one listening in."""
    parallel, device = vllm_config.parallel_config, torch.device(vllm_config.device_config.device)
    return (
        device.type == "cpu"
        and parallel.tensor_parallel_size == 1
        and vllm_config.lora_config is None
        and vllm_config.kv_transfer_config is None
    )


class DecoderLayers:
    """Layers under a name in vLLM's forward context.

    Args:
        layers: in order.
        one_by_one: runs them as modules: maps hidden states, residual and positions to the next two.
        engine: of the layers.
        name: unique among vLLM's layers.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        one_by_one: Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]],
        engine: Engine,
        vllm_config: api.VllmConfig,
        name: str,
    ) -> None:
        self._layers, self._one_by_one, self._engine = layers, one_by_one, engine
        self._states: list[Any] = [
            layer.self_attn.attn if layer.layer_type == FULL_ATTENTION else layer.linear_attn.core for layer in layers
        ]
        self._names = [getattr(state, "layer_name", None) or state.prefix for state in self._states]
        self._stack: DecoderStack | None = None
        self._groups: tuple[list[str], list[str]] = ([], [])
        self._made_of: tuple[int, ...] = ()
        self._kept: list[Any] = []
        self.name = name
        vllm_config.compilation_config.static_forward_context[name] = self

    def __call__(self, hidden_states: Tensor, residual: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Map hidden states [T, hidden], residual [T, hidden] or None and positions [T] to the next two."""
        return torch.ops.qnext.vllm_decoder_layers(hidden_states, residual, positions, self.name)  # type: ignore[no-any-return]

    def run(self, hidden_states: Tensor, residual: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The operator's implementation."""
        context, tokens = api.get_forward_context(), hidden_states.shape[0]
        metadata = context.attn_metadata
        # A profiling run has none.
        if isinstance(metadata, dict) and self._names[0] in metadata and (stack := self._stacked(metadata)) is not None:
            nets = [delta_net_step(batch_of(context, metadata[name]), tokens) for name in self._groups[0]]
            attentions = [_attention_step(metadata[name], tokens) for name in self._groups[1]]
            if None not in nets and None not in attentions:
                return stack.run(hidden_states, residual, positions, nets, attentions)  # type: ignore[arg-type]
        return self._one_by_one(hidden_states, residual, positions)

    def _stacked(self, metadata: dict[str, Any]) -> DecoderStack | None:
        """The layers as they are now; made anew where their weights or caches have been."""
        caches = [state.kv_cache for state in self._states]
        made_of = (weights_version(), *map(id, caches))
        if made_of != self._made_of:
            self._kept = caches
            self._stack, self._made_of = self._make(metadata), made_of
            if self._stack is not None:
                logger.info(STACKED, len(self._layers))
        return self._stack

    def _make(self, metadata: dict[str, Any]) -> DecoderStack | None:
        groups: tuple[list[str], list[str]] = ([], [])
        caches = []
        for layer, state, name in zip(self._layers, self._states, self._names, strict=True):
            attends = layer.layer_type == FULL_ATTENTION
            if attends and not issubclass(state.attn_backend, QnextAttentionBackend):
                return None
            known = groups[attends]
            group = next((n for n, other in enumerate(known) if metadata[other] is metadata[name]), len(known))
            if group == len(known):
                known.append(name)
            if attends:
                caches.append(LayerCache(group, keys_and_values(state.kv_cache), state.impl.scale))
            else:
                caches.append(LayerCache(group, state.pools))
        self._groups = groups
        return stack_layers(self._layers, self._engine, caches)


def _attention_step(metadata: Any, tokens: int) -> AttentionStep | None:
    if metadata.num_actual_tokens != tokens or not metadata.causal:
        return None
    return AttentionStep(metadata.slot_mapping, metadata.block_table, metadata.seq_lens, metadata.query_start_loc)


def _run(hidden_states: Tensor, residual: Tensor | None, positions: Tensor, name: str) -> tuple[Tensor, Tensor]:
    return api.get_forward_context().no_compile_layers[name].run(hidden_states, residual, positions)  # type: ignore[no-any-return]


def _empty(hidden_states: Tensor, residual: Tensor | None, positions: Tensor, name: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_states), torch.empty_like(hidden_states)


# Opaque to torch.compile: the batch's metadata and the caches come from vLLM's forward context.
_library = torch.library.Library("qnext", "FRAGMENT")
_library.define(
    "vllm_decoder_layers(Tensor hidden_states, Tensor? residual, Tensor positions, str name) -> (Tensor, Tensor)"
)
_library.impl("vllm_decoder_layers", _run, "CompositeExplicitAutograd")
torch.library.register_fake("qnext::vllm_decoder_layers", _empty, lib=_library)
