"""The decoder layers of a decode step as one call of C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qnext_kernels.decoder_layer.stack import AttentionStep, DecoderStack
from qnext_plugins.model import DecoderLayer, Engine
from qnext_plugins.model.config import FULL_ATTENTION
from qnext_plugins.model.decoder_stack import STACKED, LayerCache, delta_net_step, stack_layers
from qnext_plugins.packed_methods import weights_version
from qnext_sglang import logger
from qnext_sglang import sglang_api as api
from qnext_sglang.cpu.gated_delta_net import CpuHybridBackend


class DecoderLayers:
    """Layers of a model and SGLang's pools for them.

    Args:
        layers: in order.
        engine: of the layers.
    """

    def __init__(self, layers: Sequence[DecoderLayer], engine: Engine) -> None:
        self._layers, self._engine = layers, engine
        self._states: list[Any] = [
            layer.self_attn.attn if layer.layer_type == FULL_ATTENTION else layer.linear_attn.core for layer in layers
        ]
        self._stack: DecoderStack | None = None
        self._made_of: tuple[int, ...] = ()
        self._kept: tuple[Any, ...] = ()

    def run(self, hidden_states: Tensor, positions: Tensor, forward_batch: Any) -> tuple[Tensor, Tensor] | None:
        """Map hidden states [T, hidden] to those behind the last layer and the residual; None where modules must run.

        They must in a prefill, and in a verify, whose states go to SGLang's step pools.
        """
        backend = api.get_attn_backend()
        if not forward_batch.forward_mode.is_decode() or not isinstance(backend, CpuHybridBackend):
            return None
        if torch.compiler.is_compiling() or (stack := self._stacked(backend)) is None:
            return None
        tokens, linear, full = hidden_states.shape[0], backend.linear_attn_backend, backend.full_attn_backend.batch
        net = delta_net_step(linear.batch, tokens)
        if net is None or full is None or full.tokens != tokens:
            return None
        where = AttentionStep(forward_batch.out_cache_loc, full.slots, full.seq_lens, full.query_start_loc)
        out = stack.run(hidden_states, None, positions, [net], [where])
        if forward_batch.mamba_track_mask is not None:
            for layer, state in zip(self._layers, self._states, strict=True):
                if layer.layer_type != FULL_ATTENTION:
                    linear.track(state.attn.layer_id, forward_batch)
        return out

    def _stacked(self, backend: CpuHybridBackend) -> DecoderStack | None:
        """The layers as they are now; made anew where their weights have been, or for other pools."""
        pools = backend.token_to_kv_pool, backend.req_to_token_pool
        made_of = (weights_version(), *map(id, pools))
        if made_of != self._made_of:
            self._kept = pools
            self._stack, self._made_of = self._make(*pools), made_of
            if self._stack is not None:
                logger.info(STACKED, len(self._layers))
        return self._stack

    def _make(self, tokens: Any, requests: Any) -> DecoderStack | None:
        caches = []
        for layer, state in zip(self._layers, self._states, strict=True):
            if layer.layer_type == FULL_ATTENTION:
                keys, values = tokens.get_key_buffer(state.attn.layer_id), tokens.get_value_buffer(state.attn.layer_id)
                # Blocks of one slot.
                caches.append(LayerCache(0, (keys[:, None], values[:, None]), state.attn.scaling))
            else:
                states = requests.mamba2_layer_cache(state.attn.layer_id)
                caches.append(LayerCache(0, (states.conv[0], states.temporal)))
        return stack_layers(self._layers, self._engine, caches)
