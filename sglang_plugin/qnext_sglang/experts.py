"""The routed experts: SGLang's loading, sharding, dispatch and quantization around our routing and our kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qnext_kernels import topk_softmax
from qnext_plugins.model import Qwen3NextConfig
from qnext_plugins.packed_methods import PackedExperts
from qnext_sglang import sglang_api as api


class QnextMoEMethod(PackedExperts, api.UnquantizedFusedMoEMethod):
    """Unquantized experts on our kernel."""

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:
        """No runner of SGLang's: ``apply`` is a direct kernel on standard top-k with local expert indices."""
        self.moe_runner_config = moe_runner_config

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        weights, ids = dispatch_output.topk_output[:2]
        return api.StandardCombineInput(hidden_states=self.run(layer, dispatch_output.hidden_states, weights, ids))


class SparseExperts(api.FusedMoE):
    """:class:`qnext_plugins.model.port.Experts`: routes, runs the experts, adds the shared one, sums over the ranks."""

    def __init__(
        self,
        config: Qwen3NextConfig,
        shared_expert: nn.Module | None,
        *,
        layer_id: int,
        quant_config: Any,
        quant_method: Any,
        prefix: str,
    ) -> None:
        super().__init__(
            num_experts=config.num_experts,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            layer_id=layer_id,
            top_k=config.num_experts_per_tok,
            quant_config=quant_config,
            quant_method=quant_method,
            inplace=False,  # the shared expert reads the same hidden states afterwards
            prefix=prefix,
        )
        self.renormalize = config.norm_topk_prob
        # Held in a tuple: it is a child of the block, under the checkpoint's name for it.
        self._shared_expert = (shared_expert,)

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        weights, ids = topk_softmax(router_logits, self.top_k, self.renormalize)
        out = super().forward(hidden_states, api.StandardTopKOutput(weights, ids, router_logits))
        if (shared_expert := self._shared_expert[0]) is not None:
            out = out + shared_expert(hidden_states)
        return api.tensor_model_parallel_all_reduce(out)
