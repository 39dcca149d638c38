"""One decoder layer: norm, token mixer, norm, MLP or experts (transformers' ``Qwen3NextDecoderLayer``)."""

from __future__ import annotations

from torch import Tensor, nn

from qnext_kernels import linear_norm_experts, sigmoid_gate
from qnext_plugins.model.config import FULL_ATTENTION, Qwen3NextConfig
from qnext_plugins.model.gated_attention import GatedAttention
from qnext_plugins.model.gated_delta_net import GatedDeltaNet
from qnext_plugins.model.port import Engine
from qnext_plugins.model.sparse_moe import MLP, SparseMoe


class DecoderLayer(nn.Module):
    """The residual stream runs beside the hidden states, so that each norm adds it up (``residual`` None: start)."""

    def __init__(self, config: Qwen3NextConfig, engine: Engine, layer_type: str, *, sparse: bool, prefix: str) -> None:
        super().__init__()
        self.layer_type = layer_type
        self._engine = engine
        if layer_type == FULL_ATTENTION:
            self.self_attn = GatedAttention(config, engine, prefix=f"{prefix}.self_attn")
        else:
            self.linear_attn = GatedDeltaNet(config, engine, prefix=f"{prefix}.linear_attn")
        if sparse:
            self.mlp: nn.Module = SparseMoe(config, engine, prefix=f"{prefix}.mlp")
        else:
            size = config.intermediate_size
            self.mlp = MLP(config.hidden_size, size, engine, reduce=True, prefix=f"{prefix}.mlp")
        self.input_layernorm = engine.norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = engine.norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, residual: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Map hidden states [T, hidden], residual [T, hidden] or None, positions [T] to the next two."""
        if self.layer_type == FULL_ATTENTION:
            mixed, gate, residual = self.self_attn(hidden_states, residual, self.input_layernorm, positions)
            out_proj = self.self_attn.o_proj
        else:
            mixed, residual = self.linear_attn(hidden_states, residual, self.input_layernorm)
            gate, out_proj = None, self.linear_attn.out_proj
        norm, weight = self.post_attention_layernorm, self._engine.linear_weight(out_proj)
        if weight is not None and isinstance(self.mlp, SparseMoe) and (block := self.mlp.weights()) is not None:
            return linear_norm_experts(mixed, gate, weight, residual, norm.weight, norm.eps, *block)
        hidden_states = out_proj(mixed if gate is None else sigmoid_gate(mixed, gate))
        hidden_states, residual = norm(hidden_states, residual)
        return self.mlp(hidden_states), residual
