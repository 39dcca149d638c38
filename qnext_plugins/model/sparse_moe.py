"""The MoE block: router, routed experts, shared expert with its gate (transformers' ``Qwen3NextSparseMoeBlock``)."""

from __future__ import annotations

from torch import Tensor, nn

from qnext_kernels import ExpertsWeights, LinearWeight, sigmoid_gate, silu_and_mul
from qnext_plugins.model.config import Qwen3NextConfig
from qnext_plugins.model.port import Engine


class MLP(nn.Module):
    """SwiGLU, [T, hidden] → [T, hidden]; with ``gate``, scaled by the sigmoid of that linear of the input.

    ``reduce``: sum over the ranks; the shared expert leaves that to the sum with the routed experts.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        engine: Engine,
        *,
        reduce: bool,
        gate: nn.Module | None = None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.gate_up_proj = engine.gate_up_linear(hidden_size, intermediate_size, prefix=f"{prefix}.gate_up_proj")
        self.down_proj = engine.row_linear(intermediate_size, hidden_size, reduce=reduce, prefix=f"{prefix}.down_proj")
        # Held in a tuple: the gate is a child of the block, under the checkpoint's name for it.
        self._gate = (gate,)

    def linears(self) -> tuple[nn.Module, nn.Module, nn.Module | None]:
        """Gate and up projection in one, down projection and ``gate``, for kernels that read their weights."""
        return self.gate_up_proj, self.down_proj, self._gate[0]

    def forward(self, x: Tensor) -> Tensor:
        out = self.down_proj(silu_and_mul(self.gate_up_proj(x)))
        gate = self._gate[0]
        return out if gate is None else sigmoid_gate(out, gate(x))


class SparseMoe(nn.Module):
    """[T, hidden] → [T, hidden]: Σ of the top-k experts, plus the gated shared expert."""

    def __init__(self, config: Qwen3NextConfig, engine: Engine, *, prefix: str) -> None:
        super().__init__()
        self._engine = engine
        self._routing = (config.num_experts_per_tok, config.norm_topk_prob)
        hidden = config.hidden_size
        self.gate = engine.replicated_linear(hidden, config.num_experts, quantized=False, prefix=f"{prefix}.gate")
        shared_size = config.shared_expert_intermediate_size
        self.shared_expert: MLP | None = None
        if shared_size > 0:
            gate_prefix = f"{prefix}.shared_expert_gate"
            self.shared_expert_gate = engine.replicated_linear(hidden, 1, quantized=False, prefix=gate_prefix)
            self.shared_expert = MLP(
                hidden,
                shared_size,
                engine,
                reduce=False,
                gate=self.shared_expert_gate,
                prefix=f"{prefix}.shared_expert",
            )
        self.experts = engine.experts(config, self.shared_expert, prefix=f"{prefix}.experts")

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.experts(hidden_states, self.gate(hidden_states))

    def weights(self) -> tuple[LinearWeight, ExpertsWeights, int, bool] | None:
        """Router, experts, experts a token and whether their weights are normalised, for one call; or None."""
        if (router := self._engine.linear_weight(self.gate)) is None:
            return None
        experts = self._engine.experts_weights(self.experts)
        return None if experts is None else (router, experts, *self._routing)
