"""The experts: SGLang's loading, sharding, dispatch and quantization around our routing and our kernels."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from qnext_kernels import OPERATIONS, topk_softmax
from qnext_plugins.gpus import experts_obstacle, fp8_experts_obstacle
from qnext_plugins.model import MLP, Qwen3NextConfig
from qnext_plugins.packed_methods import (
    Fp8Experts,
    Int4Experts,
    LeftAsLoaded,
    PackedExperts,
    compute_along,
    leave_to_experts,
    stored_as,
)
from qnext_sglang import UnsupportedEngineError, quantization, serving, step_back
from qnext_sglang import sglang_api as api
from qnext_sglang.linear import QnextFp8LinearMethod, QnextInt4LinearMethod, QnextInt8LinearMethod, QnextLinearMethod


class _OurKernel:
    """``apply`` is a direct kernel on standard top-k with local expert indices: there is no runner of SGLang's."""

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:
        self.moe_runner_config = moe_runner_config

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        weights, ids = dispatch_output.topk_output[:2]
        out = self.run(layer, dispatch_output.hidden_states, weights, ids)  # type: ignore[attr-defined]
        return api.StandardCombineInput(hidden_states=out)


class QnextMoEMethod(_OurKernel, PackedExperts, api.UnquantizedFusedMoEMethod):
    """Unquantized experts on our kernel."""


class QnextFp8MoEMethod(_OurKernel, Fp8Experts, api.Fp8MoEMethod):
    """Experts in block-wise FP8 on our kernel, which reads weights and scales as the checkpoint stores them."""


class QnextInt4MoEMethod(_OurKernel, Int4Experts, api.FusedMoEMethodBase):
    """Experts in group-wise int4 on our kernel, on a CPU; for SGLang's own they would lie transposed."""


class SharedFp8LinearMethod(LeftAsLoaded, api.LinearMethodBase):
    """Of the shared expert's projections in block-wise FP8, where on a GPU our kernel for experts reads them."""


READ_ALONG: dict[type, tuple[type, ...]] = {
    QnextMoEMethod: (api.UnquantizedLinearMethod, QnextLinearMethod),
    QnextFp8MoEMethod: (api.Fp8LinearMethod, QnextFp8LinearMethod),
    QnextInt4MoEMethod: (QnextInt4LinearMethod, QnextInt8LinearMethod, QnextLinearMethod),
}
"""For each of our methods of experts, the methods of a shared expert's linears that its kernel reads with them."""


class QnextFusedMoE(api.FusedMoE):
    """:class:`qnext_plugins.model.port.Experts`: routes, runs the experts, adds the shared one.

    SGLang knows experts by what the class is called, in checkpoints of compressed-tensors.

    ``reduce``: sum over the ranks.
    """

    def __init__(
        self,
        config: Qwen3NextConfig,
        shared_expert: MLP | None,
        *,
        reduce: bool,
        layer_id: int,
        quant_config: Any,
        prefix: str,
    ) -> None:
        middle = config.moe_intermediate_size // api.get_parallel().moe_tp_size
        routing = api.RoutingMethodType.RenormalizeNaive if config.norm_topk_prob else api.RoutingMethodType.Default
        super().__init__(
            num_experts=config.num_experts,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            layer_id=layer_id,
            top_k=config.num_experts_per_tok,
            quant_config=quant_config,
            quant_method=our_method(quant_config, prefix, middle, serving.device(), torch.get_default_dtype()),
            inplace=False,  # the shared expert reads the same hidden states afterwards
            prefix=prefix,
            routing_method_type=routing,
        )
        self.renormalize, self._reduce = config.norm_topk_prob, reduce
        self.sglangs_topk = None
        if serving.device().type != "cpu" and not isinstance(self.quant_method, _OurKernel):
            # Some of SGLang's experts route by themselves.
            self.sglangs_topk = api.TopK(self.top_k, renormalize=self.renormalize, layer_id=layer_id)
            self.sglangs_topk.bind_runner_backend(self.runner_backend, routing_method_type=self.routing_method_type)
        along = shared_expert is not None and computes_shared(self.quant_method, shared_expert, middle)
        if shared_expert is not None and along:
            leave_to_experts(shared_expert, {api.Fp8LinearMethod: SharedFp8LinearMethod})
        compute_along(self, shared_expert if along else None)
        # Held in a tuple: it is a child of the block, under the checkpoint's name for it.
        self._added_expert = (None if along else shared_expert,)
        ranks = max(self.moe_tp_size, self.moe_ep_size, api.get_parallel().tp_size)
        self.ours_alone = ranks == 1 and self._added_expert[0] is None
        """Whether ``forward`` does nothing but call our routing and our experts kernel, where its method is ours."""

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        out = super().forward(hidden_states, self._route(hidden_states, router_logits))
        if (shared_expert := self._added_expert[0]) is not None:
            out = out + shared_expert(hidden_states)
        return api.tensor_model_parallel_all_reduce(out) if self._reduce else out

    def _route(self, hidden_states: Tensor, router_logits: Tensor) -> Any:
        if self.sglangs_topk is not None:
            return self.sglangs_topk(hidden_states, router_logits)
        weights, ids = topk_softmax(router_logits, self.top_k, self.renormalize)
        return api.StandardTopKOutput(weights, ids, router_logits)


def computes_shared(method: Any, shared_expert: MLP, middle: int) -> bool:
    """Whether the calls of our routed experts compute the shared one along, if they read how it is stored.

    In C++ they do; in Triton, where a rank's parts of both are of one size.

    Args:
        method: of the routed experts.
        middle: this rank's columns between the two products of a routed expert.
    """
    read = READ_ALONG.get(type(method))
    backend = OPERATIONS["moe"].select(serving.device(), torch.get_default_dtype()).name
    down: Any = shared_expert.linears()[1]
    same_size = down.input_size_per_partition == middle
    if read is None or not (backend == "native" or (backend == "triton" and same_size)):
        return False
    return stored_as(shared_expert, *read)


def our_method(quant_config: Any, prefix: str, middle: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Our method for the experts at ``prefix``; None, on a GPU with one line, where they stay SGLang's own.

    Args:
        quant_config: SGLang's, or None.
        prefix: the experts' name in the checkpoint.
        middle: this rank's columns between the two products of an expert.
        device, dtype: of the activations.

    Raises:
        UnsupportedEngineError: they would stay SGLang's own, on a plain CPU or with ``QNEXT_STRICT=1``.
    """
    if quantization.leaves_experts(quant_config, prefix):
        quant_config = None
    reason = obstacle(quant_config, middle, device, dtype)
    if quantization.is_int4(quant_config) and quant_config.integers.bits(prefix) != 4:
        reason = "they are in int8"
    if reason is not None:
        if serving.on_plain_cpu():
            raise UnsupportedEngineError(f"qnext-plugins on a CPU does not serve the experts: {reason}")
        if device.type != "cpu":
            _say_once(reason)
        return None
    if quantization.is_int4(quant_config):
        return QnextInt4MoEMethod(quant_config.integers.group)
    return QnextMoEMethod() if quant_config is None else QnextFp8MoEMethod(quant_config)


def obstacle(quant_config: Any, middle: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why experts stay SGLang's own, on a GPU their routing with them, or None."""
    if quantization.is_int4(quant_config):
        return None
    if quant_config is not None:
        block = quant_config.weight_block_size if isinstance(quant_config, api.Fp8Config) else None
        reason = fp8_experts_obstacle(quant_config.get_name(), block, middle, device, dtype)
    else:
        reason = None if device.type == "cpu" else experts_obstacle(device, dtype)
    return reason if device.type == "cpu" else _asked_for() or reason


def _asked_for() -> str | None:
    """What this configuration asks of SGLang's own experts on a GPU, or None."""
    server_args, moe_runner = api.get_server_args(), api.get_moe_runner_backend()
    reasons = {
        # Where SGLang itself chooses another one than auto, as on sm_100, that one is its fastest.
        f"--moe-runner-backend is {moe_runner.value}": not moe_runner.is_auto(),
        "--kt-weight-path leaves some of them to a CPU": server_args.kt_weight_path is not None,
        "--enable-paged-experts moves their weights": server_args.enable_paged_experts,
        "SGLANG_USE_AITER=1 asks for AITER's": api.get_bool_env_var("SGLANG_USE_AITER"),
    }
    return next((reason for reason, given in reasons.items() if given), None)


@cache
def _say_once(reason: str) -> None:
    step_back("qnext-plugins leaves SGLang's own experts in place: %s", reason)
