"""All layers of a step without prefills as one call of C++, where it serves whatever they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from qnext_kernels.decoder_layer.stack import (
    AttentionMixer,
    DecoderStack,
    DeltaNetMixer,
    DeltaNetStep,
    StackedLayer,
    stackable,
)
from qnext_plugins.model.config import FULL_ATTENTION
from qnext_plugins.model.decoder_layer import DecoderLayer
from qnext_plugins.model.gated_delta_net import RecurrentBatch, Segment, only_segment
from qnext_plugins.model.port import Engine
from qnext_plugins.model.sparse_moe import SparseMoe

STACKED = "qnext-plugins: in a step without prefills, %d decoder layers are one call"
"""What an engine logs."""


@dataclass(frozen=True)
class LayerCache:
    """What an engine keeps of sequences for one layer."""

    group: int
    """Layers of one kind and group have their blocks or slots in common."""
    pools: tuple[Tensor, Tensor]
    """Convolution and recurrent states as in ``StatePools``, or keys and values [blocks, block_size, KV, D]."""
    scale: float = 1.0
    """Of the attention's scores."""


def stack_layers(layers: Sequence[DecoderLayer], engine: Engine, caches: Sequence[LayerCache]) -> DecoderStack | None:
    """These layers, with the caches of each, as one call, or None where one of them does what the call does not."""
    stacked = [_stacked(layer, engine, cache) for layer, cache in zip(layers, caches, strict=True)]
    known = [layer for layer in stacked if layer is not None]
    eps = layers[0].input_layernorm.eps
    return DecoderStack(known, eps) if len(known) == len(layers) and stackable(known, eps) else None


def delta_net_step(batch: RecurrentBatch, num_tokens: int) -> DeltaNetStep | None:
    """What a batch of so many tokens is for the call: a decode or a verify, and nothing else; or None."""
    segment = only_segment(batch, num_tokens)
    if segment is None:
        return None
    if isinstance(segment, Segment):
        return DeltaNetStep(segment.slots[:, None].contiguous())
    where = (segment.slots, segment.query_start_loc, segment.num_accepted_tokens)
    return DeltaNetStep(*(index.contiguous() for index in where))


def _stacked(layer: DecoderLayer, engine: Engine, cache: LayerCache) -> StackedLayer | None:
    block = layer.mlp.weights() if isinstance(layer.mlp, SparseMoe) else None
    mixer: DeltaNetMixer | AttentionMixer
    if layer.layer_type == FULL_ATTENTION:
        attention = layer.self_attn
        out_proj, qkv = engine.linear_weight(attention.o_proj), engine.linear_weight(attention.qkv_proj)
        if out_proj is None or qkv is None:
            return None
        norms = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
        heads = (*norms, attention.cos_sin, attention.num_heads, attention.num_kv_heads)
        mixer = AttentionMixer(qkv, *heads, *cache.pools, cache.scale)
    else:
        net = layer.linear_attn
        linears = [engine.linear_weight(linear) for linear in (net.out_proj, net.in_proj_qkvz, net.in_proj_ba)]
        out_proj, qkvz, ba = linears
        if out_proj is None or qkvz is None or ba is None:
            return None
        mixer = DeltaNetMixer(qkvz, ba, net.core_weights(), *cache.pools)
    if block is None:
        return None
    norms = layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach()
    return StackedLayer(norms[0], mixer, cache.group, out_proj, norms[1], *block)
