"""The experts: vLLM's loading, sharding and quantization around our routing and our experts kernel."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from qnext_kernels import OPERATIONS, topk_softmax
from qnext_plugins.gpus import experts_obstacle, fp8_experts_obstacle
from qnext_plugins.model import MLP
from qnext_plugins.packed_methods import (
    Fp8Experts,
    Int4Experts,
    LeftAsLoaded,
    PackedExperts,
    ScaledExperts,
    compute_along,
    leave_to_experts,
    stored_as,
)
from qnext_vllm import step_back
from qnext_vllm import vllm_api as api
from qnext_vllm.linear import (
    CpuFp8Config,
    CpuInt4Config,
    QnextFp8LinearMethod,
    QnextInt4LinearMethod,
    QnextInt8LinearMethod,
    QnextLinearMethod,
    leaves_out,
)


def route(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """vLLM's ``custom_routing_function``: weights [T, topk] float32 and expert indices [T, topk] int32."""
    return topk_softmax(gating_output, topk, renormalize)


class _OurKernel:
    """Runs the experts with our routing's choice."""

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
        return self.run(layer, x, topk_weights, local_ids(layer, topk_ids))  # type: ignore[attr-defined,no-any-return]


class QnextMoEMethod(_OurKernel, PackedExperts, api.UnquantizedFusedMoEMethod):
    """Unquantized experts on our kernel."""

    def __init__(self, moe: Any) -> None:
        # Not the parent's __init__: it looks for an in-tree kernel, and raises on a CPU where there is none. The
        # backend only says that sizes need no padding.
        api.FusedMoEMethodBase.__init__(self, moe)
        self.unquantized_backend = api.UnquantizedMoeBackend.OOT
        self.experts_cls = None
        self.supports_pre_processed_weights = leaves_weights(moe)


class QnextFp8MoEMethod(_OurKernel, Fp8Experts, api.Fp8MoEMethod):
    """Experts in block-wise FP8 on our kernel."""

    def __init__(self, quant_config: Any, layer: Any) -> None:
        super().__init__(quant_config, layer)
        self.supports_pre_processed_weights = leaves_weights(layer.moe_config)


class QnextInt4MoEMethod(_OurKernel, Int4Experts, api.FusedMoEMethodBase):
    """Experts in group-wise int4 on our kernel, on a CPU."""


class SharedFp8LinearMethod(LeftAsLoaded, api.LinearMethodBase):
    """Of the shared expert's projections in block-wise FP8, where our kernel for experts reads them."""


def leaves_weights(moe_config: Any) -> bool:
    """Whether the kernel reads weights as they are loaded, so that they are never changed twice."""
    return OPERATIONS["moe"].select(torch.device(moe_config.device), moe_config.in_dtype).name == "triton"


def local_ids(layer: Any, topk_ids: Tensor) -> Tensor:
    """Indices of this rank's experts, −1 for those of other ranks."""
    return topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]


class QnextRoutedExperts(api.RoutedExperts):
    """Takes our method where vLLM would take its unquantized or its FP8 one, and on a CPU for int4.

    Layers quantized otherwise keep vLLM's.

    ``shared_expert``: an MLP that our method computes along, in the same calls.
    """

    def __init__(self, *args: Any, shared_expert: MLP | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert shared_expert is None or isinstance(self.quant_method, PackedExperts | ScaledExperts)
        compute_along(self, shared_expert)

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        if isinstance(quant_config, CpuInt4Config):
            bits = quant_config.integers.bits(prefix)
            if bits is None:
                return QnextMoEMethod(moe_config)
            if bits != 4:
                raise ValueError(f"{prefix}: expected experts in 4 bits or not quantized, got {bits} bits")
            return QnextInt4MoEMethod(quant_config.integers.group, moe_config)
        if quant_config is not None:
            method = super()._get_quant_method(prefix, quant_config, moe_config)
            if type(method) is api.Fp8MoEMethod:
                middle, dtype = moe_config.intermediate_size_per_partition, moe_config.in_dtype
                reason = fp8_obstacle(quant_config, middle, torch.device(moe_config.device), dtype)
                if reason is not None and isinstance(quant_config, CpuFp8Config):
                    raise ValueError(f"{prefix}: {reason}")
                return method if reason is not None else QnextFp8MoEMethod(quant_config, self)
            if type(method) is not api.UnquantizedFusedMoEMethod:
                return method
        return QnextMoEMethod(moe_config)


def experts_options(vllm_config: api.VllmConfig, shared_expert: MLP | None, prefix: str) -> dict[str, Any]:
    """What makes vLLM's experts at ``prefix`` ours, and who computes the shared one.

    Where the routed experts stay vLLM's own, which is said in one line, vLLM's runner calls the shared one too.

    Raises:
        UnsupportedEngineError: with ``QNEXT_STRICT=1`` they would stay vLLM's own.
    """
    reason = obstacle(vllm_config)
    if reason is not None:
        _say_once(reason)
        return {"shared_experts": shared_expert}
    ours = {"custom_routing_function": route, "routed_experts_cls": QnextRoutedExperts}
    if shared_expert is None or not computes_shared(vllm_config, shared_expert, prefix):
        return ours | {"shared_experts": shared_expert}
    leave_to_experts(shared_expert, {api.Fp8LinearMethod: SharedFp8LinearMethod})
    return ours | {"routed_experts_args": {"shared_expert": shared_expert}}


def computes_shared(vllm_config: api.VllmConfig, shared_expert: MLP, prefix: str) -> bool:
    """Whether the calls of our routed experts compute the shared one along.

    They do where both are stored alike: without quantization, in block-wise FP8 or in int4, beside which the shared one
    may also be in int8 or not quantized. In C++ not with LoRA adapters on its linears, nor with data parallelism, where
    every rank would add it to the tokens of all; in Triton where a rank's parts of both are of one size.
    """
    device, dtype = torch.device(vllm_config.device_config.device), vllm_config.model_config.dtype
    backend, parallel = OPERATIONS["moe"].select(device, dtype).name, vllm_config.parallel_config
    middle, quant_config = columns_of_a_rank(vllm_config), vllm_config.quant_config
    if backend not in ("native", "triton"):
        return False
    if isinstance(quant_config, CpuInt4Config):
        beside_int4 = () if leaves_out(quant_config, prefix) else (QnextInt4LinearMethod, QnextInt8LinearMethod)
        if not stored_as(shared_expert, QnextLinearMethod, *beside_int4):
            return False
    elif quant_config is not None and (
        fp8_obstacle(quant_config, middle, device, dtype) is not None
        or not both_in_fp8(quant_config, shared_expert, prefix)
    ):
        return False
    if backend == "native":
        return vllm_config.lora_config is None and parallel.data_parallel_size == 1
    shared = vllm_config.model_config.hf_text_config.shared_expert_intermediate_size
    return shared // parallel.tensor_parallel_size == middle


def ours_alone(experts: Any, vllm_config: api.VllmConfig) -> bool:
    """Whether vLLM's runner of these experts does nothing but call our routing and our experts kernel."""
    if not isinstance(getattr(experts, "routed_experts", None), QnextRoutedExperts):  # LoRA puts a layer around them
        return False
    parallel, layout = vllm_config.parallel_config, experts.moe_config.moe_parallel_config
    spread = max(layout.tp_size, layout.ep_size, layout.dp_size, layout.pcp_size) > 1 or parallel.enable_eplb
    watched = vllm_config.aux_output_config.enabled
    return not spread and not watched and experts.shared_experts is None


def both_in_fp8(quant_config: Any, shared_expert: MLP, prefix: str) -> bool:
    """Whether a checkpoint in FP8 leaves out neither the routed experts at ``prefix`` nor the shared one."""
    routed_left_out = api.is_layer_skipped(
        prefix=prefix,
        ignored_layers=quant_config.ignored_layers,
        fused_mapping=quant_config.packed_modules_mapping,
        match_mode=quant_config.ignored_layers_match_mode,
    )
    return not routed_left_out and stored_as(shared_expert, api.Fp8LinearMethod, QnextFp8LinearMethod)


def columns_of_a_rank(vllm_config: api.VllmConfig) -> int:
    """Columns between the two products of a routed expert, on one rank."""
    parallel = vllm_config.parallel_config
    ranks = 1 if parallel.enable_expert_parallel else parallel.tensor_parallel_size
    return vllm_config.model_config.hf_text_config.moe_intermediate_size // ranks


def obstacle(vllm_config: api.VllmConfig) -> str | None:
    """Why the experts stay vLLM's own on a GPU, its routing with them, or None; on a CPU ours serve around vLLM's."""
    device, dtype = torch.device(vllm_config.device_config.device), vllm_config.model_config.dtype
    if device.type == "cpu":
        return None
    backend, parallel = vllm_config.kernel_config.moe_backend, vllm_config.parallel_config
    if vllm_config.quant_config is not None:
        reason = fp8_obstacle(vllm_config.quant_config, columns_of_a_rank(vllm_config), device, dtype)
        if reason is not None:
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
