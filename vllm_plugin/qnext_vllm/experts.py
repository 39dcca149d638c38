"""The routed experts: vLLM's loading, sharding and quantization around our routing and our experts kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qnext_kernels import topk_softmax
from qnext_plugins.packed_methods import PackedExperts
from qnext_vllm import vllm_api as api


def route(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """vLLM's ``custom_routing_function``: weights [T, topk] float32 and expert indices [T, topk] int32."""
    return topk_softmax(gating_output, topk, renormalize)


class QnextMoEMethod(PackedExperts, api.UnquantizedFusedMoEMethod):
    """Unquantized experts on our kernel."""

    is_monolithic = False

    def __init__(self, moe: Any) -> None:
        # Not the parent's __init__: it looks for an in-tree kernel and raises where there is none.
        api.FusedMoEMethodBase.__init__(self, moe)
        self.unquantized_backend = api.UnquantizedMoeBackend.CPU
        self.experts_cls = None
        self.supports_pre_processed_weights = True

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        return self.run(layer, x, topk_weights, topk_ids)


class QnextRoutedExperts(api.RoutedExperts):
    """Takes our method where vLLM would take its unquantized one; quantized layers keep vLLM's."""

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        if quant_config is not None:
            method = super()._get_quant_method(prefix, quant_config, moe_config)
            if type(method) is not api.UnquantizedFusedMoEMethod:
                return method
        return QnextMoEMethod(moe_config)
