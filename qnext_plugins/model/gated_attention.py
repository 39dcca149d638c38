"""Gated attention: QK-norm, partial RoPE, attention, sigmoid output gate (transformers' ``Qwen3NextAttention``)."""

from __future__ import annotations

from torch import Tensor, nn

from qnext_kernels import norm_heads, qk_norm_rope_gate
from qnext_plugins.model.config import Qwen3NextConfig
from qnext_plugins.model.norm import RMSNorm
from qnext_plugins.model.port import Engine


class GatedAttention(nn.Module):
    """All before the output gate; ``q_proj``, ``k_proj`` and ``v_proj`` of the checkpoint are ``qkv_proj`` here."""

    cos_sin: Tensor

    def __init__(self, config: Qwen3NextConfig, engine: Engine, *, prefix: str) -> None:
        super().__init__()
        self._engine = engine
        self.num_heads = config.num_attention_heads // engine.tensor_parallel_size
        self.num_kv_heads = max(1, config.num_key_value_heads // engine.tensor_parallel_size)
        self.qkv_proj = engine.qkv_linear(config, prefix=f"{prefix}.qkv_proj")
        self.o_proj = engine.row_linear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            reduce=True,
            bias=config.attention_bias,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.register_buffer("cos_sin", engine.cos_sin(config), persistent=False)
        self.attn = engine.attention(self.num_heads, self.num_kv_heads, config.head_dim, prefix=f"{prefix}.attn")

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None, norm: RMSNorm, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from the normalised sum of hidden states [T, hidden] and residual [T, hidden] or None.

        Returns:
            The attention's output and its gate [T, heads·head_dim], which ``o_proj`` is to have gated, and the sum.
        """
        q_norm, k_norm = self.q_norm, self.k_norm
        heads = (positions, q_norm.weight, k_norm.weight, self.cos_sin, self.num_heads, self.num_kv_heads)
        if (qkv := self._engine.linear_weight(self.qkv_proj)) is not None:
            q, k, v, gate, residual = norm_heads(hidden_states, residual, norm.weight, norm.eps, qkv, *heads)
        else:
            hidden_states, residual = norm(hidden_states, residual)
            q, k, v, gate = qk_norm_rope_gate(self.qkv_proj(hidden_states), *heads, q_norm.eps)
        return self.attn(q, k, v), gate, residual
