"""The model's port in plain PyTorch: what an engine package must do, for one sequence, without paging and ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qnext_kernels import ExpertsWeights, LinearWeight, experts, topk_softmax
from qnext_plugins.model import CoreWeights, DecoderLayer, Qwen3NextConfig, RecurrentBatch, RMSNorm, Segment, StatePools
from qnext_plugins.model.gated_delta_net import gated_delta_net_core


class CachedAttention(nn.Module):
    """Causal attention of one sequence; keys and values of earlier calls are kept."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = (num_heads, num_kv_heads)
        self.keys, self.values = torch.empty(2, num_kv_heads, 0, head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_heads, num_kv_heads = self.heads
        query, key, value = (
            x.unflatten(1, (heads, -1)).transpose(0, 1)
            for x, heads in ((q, num_heads), (k, num_kv_heads), (v, num_kv_heads))
        )
        self.keys = torch.cat([self.keys, key], dim=1)
        self.values = torch.cat([self.values, value], dim=1)
        total = self.keys.shape[1]
        visible = torch.ones(len(q), total, dtype=torch.bool).tril(total - len(q))
        out = F.scaled_dot_product_attention(query, self.keys, self.values, attn_mask=visible, enable_gqa=True)
        return out.transpose(0, 1).flatten(1)


class RecurrentState(nn.Module):
    """Pools of two slots for one sequence, which lives in the second; a single token behind others is a decode."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        heads, channels = config.linear_num_value_heads, 2 * config.key_dim + config.value_dim
        self.conv_state = torch.full((2, channels, config.linear_conv_kernel_dim - 1), float("nan"))
        self.state = torch.full((2, heads, config.linear_value_head_dim, config.linear_key_head_dim), float("nan"))
        self.eps, self.started = config.rms_norm_eps, False

    def forward(self, qkvz: Tensor, ba: Tensor, weights: CoreWeights) -> Tensor:
        slots, count = torch.tensor([1]), len(qkvz)
        if self.started and count == 1:
            batch = RecurrentBatch(decode=Segment(slice(None), slots))
        else:
            offsets, known = torch.tensor([0, count]), torch.tensor([self.started])
            batch = RecurrentBatch(prefill=Segment(slice(None), slots, offsets, known))
        self.started = True
        return gated_delta_net_core(qkvz, ba, weights, self.eps, StatePools(self.conv_state, self.state), batch)


class PlainExperts(nn.Module):
    def __init__(self, config: Qwen3NextConfig, shared_expert: nn.Module | None) -> None:
        super().__init__()
        count, hidden, size = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.w13 = nn.Parameter(torch.empty(count, 2 * size, hidden))
        self.w2 = nn.Parameter(torch.empty(count, hidden, size))
        self.routing = (config.num_experts_per_tok, config.norm_topk_prob)
        # Held in a tuple: the shared expert is a child of the block.
        self.shared_expert = (shared_expert,)

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        out = experts(hidden_states, self.w13, self.w2, *topk_softmax(router_logits, *self.routing))
        shared_expert = self.shared_expert[0]
        return out if shared_expert is None else out + shared_expert(hidden_states)


class PlainEngine:
    """Implements :class:`qnext_plugins.model.Engine` on one rank.

    ``gives_weights``: the kernels take its linears and experts along in calls of several operations.
    """

    tensor_parallel_size = 1

    def __init__(self, cos_sin: Tensor, *, gives_weights: bool = False) -> None:
        self._cos_sin, self._gives_weights = cos_sin, gives_weights

    def column_linear(self, input_size: int, output_size: int, *, prefix: str) -> nn.Module:
        return nn.Linear(input_size, output_size, bias=False)

    def joined_column_linear(self, input_size: int, output_sizes: tuple[int, ...], *, prefix: str) -> None:
        return None

    def gate_up_linear(self, input_size: int, intermediate_size: int, *, prefix: str) -> nn.Module:
        return nn.Linear(input_size, 2 * intermediate_size, bias=False)

    def qkv_linear(self, config: Qwen3NextConfig, *, prefix: str) -> nn.Module:
        heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
        return nn.Linear(config.hidden_size, heads * config.head_dim, bias=config.attention_bias)

    def row_linear(
        self, input_size: int, output_size: int, *, reduce: bool, bias: bool = False, prefix: str
    ) -> nn.Module:
        return nn.Linear(input_size, output_size, bias=bias)

    def replicated_linear(self, input_size: int, output_size: int, *, quantized: bool, prefix: str) -> nn.Module:
        return nn.Linear(input_size, output_size, bias=False)

    def norm(self, size: int, eps: float) -> RMSNorm:
        return RMSNorm(size, eps)

    def conv_weight(self, segments: tuple[int, ...], kernel_size: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(sum(segments), 1, kernel_size))

    def head_parameter(self, num_heads: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(num_heads))

    def cos_sin(self, config: Qwen3NextConfig) -> Tensor:
        return self._cos_sin

    def attention(self, num_heads: int, num_kv_heads: int, head_dim: int, *, prefix: str) -> CachedAttention:
        return CachedAttention(num_heads, num_kv_heads, head_dim)

    def recurrent_core(self, config: Qwen3NextConfig, *, prefix: str) -> RecurrentState:
        return RecurrentState(config)

    def experts(self, config: Qwen3NextConfig, shared_expert: nn.Module | None, *, prefix: str) -> PlainExperts:
        return PlainExperts(config, shared_expert)

    def linear_weight(self, linear: nn.Linear) -> LinearWeight | None:
        return LinearWeight(linear.weight, linear.bias) if self._gives_weights else None

    def experts_weights(self, experts: PlainExperts) -> ExpertsWeights | None:
        if not self._gives_weights:
            return None
        shared = experts.shared_expert[0]
        if shared is not None:
            up, down, gate = shared.linears()
            shared = up.weight, down.weight, gate.weight[0]
        return ExpertsWeights(experts.w13, experts.w2, False, shared)


class PlainModel(nn.Module):
    """Embedding, the shared layers, final norm and head, for one sequence that may come in pieces."""

    def __init__(self, config: Qwen3NextConfig, cos_sin: Tensor, *, gives_weights: bool = False) -> None:
        super().__init__()
        engine = PlainEngine(cos_sin, gives_weights=gives_weights)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, engine, layer_type, sparse=config.is_sparse(n), prefix=f"model.layers.{n}")
            for n, layer_type in enumerate(config.layer_types)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.seen = 0

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Tensor:
        """Map the sequence's next tokens [T] to their logits [T, vocabulary]."""
        positions = torch.arange(self.seen, self.seen + len(input_ids))
        self.seen += len(input_ids)
        hidden_states, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, positions)
        hidden_states, _ = self.norm(hidden_states, residual)
        return self.lm_head(hidden_states)


JOINED = {".qkv_proj.": (".q_proj.", ".k_proj.", ".v_proj."), ".gate_up_proj.": (".gate_proj.", ".up_proj.")}
RENAMED = {".experts.gate_up_proj": ".experts.w13", ".experts.down_proj": ".experts.w2"}


def stacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn transformers' parameters in memory, where experts are fused already, into those of the plain engine.

    What is joined comes in the order of ``JOINED``, which is that of transformers' modules.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, weight in weights.items():
        name = name.removeprefix("model.")
        for new, olds in JOINED.items():
            for old in olds:
                name = name.replace(old, new)
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        parts.setdefault(name, []).append(weight)
    return {name: torch.cat(weights) for name, weights in parts.items()}
