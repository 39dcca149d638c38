"""The routed experts: vLLM's loading, sharding and quantization around our routing and our experts kernel."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from qnext_kernels import topk_softmax
from qnext_plugins.gpus import experts_obstacle, fp8_experts_obstacle
from qnext_plugins.packed_methods import Fp8Experts, PackedExperts
from qnext_vllm import step_back
from qnext_vllm import vllm_api as api


def route(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """vLLM's ``custom_routing_function``: weights [T, topk] float32 and expert indices [T, topk] int32."""
    return topk_softmax(gating_output, topk, renormalize)


class QnextMoEMethod(PackedExperts, api.UnquantizedFusedMoEMethod):
    """Unquantized experts on our kernel."""

    is_monolithic = False

    def __init__(self, moe: Any) -> None:
        # Not the parent's __init__: it looks for an in-tree kernel, and raises on a CPU where there is none. The
        # backend only says that sizes need no padding.
        api.FusedMoEMethodBase.__init__(self, moe)
        self.unquantized_backend = api.UnquantizedMoeBackend.OOT
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
        return self.run(layer, x, topk_weights, local_ids(layer, topk_ids))


class QnextFp8MoEMethod(Fp8Experts, api.Fp8MoEMethod):
    """Experts in block-wise FP8 on our kernel, which reads weights and scales as the checkpoint stores them."""

    is_monolithic = False

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        return self.run(layer, x, topk_weights, local_ids(layer, topk_ids))


def local_ids(layer: Any, topk_ids: Tensor) -> Tensor:
    """Indices of this rank's experts, −1 for those of other ranks."""
    return topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]


class QnextRoutedExperts(api.RoutedExperts):
    """Takes our method where vLLM would take its unquantized or its FP8 one; layers quantized otherwise keep vLLM's."""

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        if quant_config is not None:
            method = super()._get_quant_method(prefix, quant_config, moe_config)
            if type(method) is api.Fp8MoEMethod:
                middle, dtype = moe_config.intermediate_size_per_partition, moe_config.in_dtype
                ours = fp8_obstacle(quant_config, middle, torch.device(moe_config.device), dtype) is None
                return QnextFp8MoEMethod(quant_config, self) if ours else method
            if type(method) is not api.UnquantizedFusedMoEMethod:
                return method
        return QnextMoEMethod(moe_config)


def experts_options(vllm_config: api.VllmConfig) -> dict[str, Any]:
    """What makes vLLM's experts ours; nothing, with one line, where they stay vLLM's own.

    Raises:
        UnsupportedEngineError: with ``QNEXT_STRICT=1`` they would stay vLLM's own.
    """
    reason = obstacle(vllm_config)
    if reason is not None:
        _say_once(reason)
        return {}
    return {"custom_routing_function": route, "routed_experts_cls": QnextRoutedExperts}


def obstacle(vllm_config: api.VllmConfig) -> str | None:
    """Why the experts stay vLLM's own on a GPU, its routing with them, or None; on a CPU ours serve around vLLM's."""
    device, dtype = torch.device(vllm_config.device_config.device), vllm_config.model_config.dtype
    if device.type == "cpu":
        return None
    backend, parallel = vllm_config.kernel_config.moe_backend, vllm_config.parallel_config
    if vllm_config.quant_config is not None:
        ranks = 1 if parallel.enable_expert_parallel else parallel.tensor_parallel_size
        middle = vllm_config.model_config.hf_text_config.moe_intermediate_size // ranks
        if (reason := fp8_obstacle(vllm_config.quant_config, middle, device, dtype)) is not None:
            return reason
    if backend != "auto":
        return f"--moe-backend {backend} is asked for"
    if vllm_config.lora_config is not None:
        return "LoRA adapters reach into vLLM's kernels"
    if parallel.data_parallel_size > 1:
        return "data parallelism sends their tokens between the ranks"
    return experts_obstacle(device, dtype)


def fp8_obstacle(quant_config: Any, middle: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why quantized experts with ``middle`` columns between their products on this rank are not ours, or None."""
    block = quant_config.weight_block_size if isinstance(quant_config, api.Fp8Config) else None
    return fp8_experts_obstacle(quant_config.get_name(), block, middle, device, dtype)


@cache
def _say_once(reason: str) -> None:
    step_back("qnext-plugins leaves vLLM's own experts in place: %s", reason)
