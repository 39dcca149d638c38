"""vLLM's parts behind the port of the shared model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qnext_kernels import ExpertsWeights, LinearWeight
from qnext_plugins.gpus import joins
from qnext_plugins.model import MLP, Qwen3NextConfig, RMSNorm
from qnext_plugins.model.sharding import sharded_parameter
from qnext_plugins.packed_methods import experts_weights, linear_weight
from qnext_vllm import vllm_api as api
from qnext_vllm.attention import attention_backend
from qnext_vllm.experts import experts_options, ours_alone
from qnext_vllm.gated_delta_net import GatedDeltaNetState
from qnext_vllm.linear import on_our_kernel


class VisibleRMSNorm(RMSNorm):
    """In operators that vLLM's compiler knows: it joins a norm with the sum over the ranks in front of it."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight = self.weight.float() + 1.0
        if residual is None:
            return api.rms_norm(x, weight, self.eps), x
        return api.fused_add_rms_norm(x, residual, weight, self.eps)  # type: ignore[no-any-return]


class VllmEngine:
    """Implements :class:`qnext_plugins.model.Engine` with vLLM's parallel layers, quantization and caches."""

    def __init__(self, vllm_config: api.VllmConfig) -> None:
        self.vllm_config = vllm_config
        self.quant_config = vllm_config.quant_config
        self.tensor_parallel_size: int = api.get_tensor_model_parallel_world_size()
        self._rank = {"rank": api.get_tensor_model_parallel_rank(), "ranks": self.tensor_parallel_size}

    def column_linear(self, input_size: int, output_size: int, *, prefix: str) -> nn.Module:
        return on_our_kernel(api.ColumnParallelLinear(input_size, output_size, **self._linear(prefix)))

    def joined_column_linear(self, input_size: int, output_sizes: tuple[int, ...], *, prefix: str) -> nn.Module | None:
        config = self.vllm_config
        # Adapters go to linears of the checkpoint.
        if self.quant_config is not None or config.lora_config is not None:
            return None
        if not joins(torch.device(config.device_config.device), output_sizes, self.tensor_parallel_size):
            return None
        return on_our_kernel(api.MergedColumnParallelLinear(input_size, list(output_sizes), **self._linear(prefix)))

    def gate_up_linear(self, input_size: int, intermediate_size: int, *, prefix: str) -> nn.Module:
        sizes = [intermediate_size] * 2
        return on_our_kernel(api.MergedColumnParallelLinear(input_size, sizes, **self._linear(prefix)))

    def qkv_linear(self, config: Qwen3NextConfig, *, prefix: str) -> nn.Module:
        return on_our_kernel(
            api.QKVParallelLinear(
                config.hidden_size,
                config.head_dim,
                2 * config.num_attention_heads,
                config.num_key_value_heads,
                **self._linear(prefix, bias=config.attention_bias),
            )
        )

    def row_linear(
        self, input_size: int, output_size: int, *, reduce: bool, bias: bool = False, prefix: str
    ) -> nn.Module:
        options = self._linear(prefix, bias=bias)
        return on_our_kernel(api.RowParallelLinear(input_size, output_size, reduce_results=reduce, **options))

    def replicated_linear(self, input_size: int, output_size: int, *, quantized: bool, prefix: str) -> nn.Module:
        options = self._linear(prefix)
        # Checkpoints in NVFP4 have the draft's `fc` in bfloat16, but do not list it as left out.
        if not quantized or (self.quant_config is not None and self.quant_config.get_name() == "modelopt_fp4"):
            options["quant_config"] = None
        return on_our_kernel(api.ReplicatedLinear(input_size, output_size, **options))

    def norm(self, size: int, eps: float) -> RMSNorm:
        joined = self.vllm_config.compilation_config.pass_config.fuse_allreduce_rms
        return (VisibleRMSNorm if joined else RMSNorm)(size, eps)

    def conv_weight(self, segments: tuple[int, ...], kernel_size: int) -> nn.Parameter:
        return sharded_parameter(segments, 1, kernel_size, dtype=torch.get_default_dtype(), **self._rank)

    def head_parameter(self, num_heads: int) -> nn.Parameter:
        return sharded_parameter((num_heads,), dtype=torch.float32, **self._rank)

    def cos_sin(self, config: Qwen3NextConfig) -> Tensor:
        hf_config = self.vllm_config.model_config.hf_text_config
        rotary = api.get_rope(
            head_size=config.head_dim,
            max_position=hf_config.max_position_embeddings,
            rope_parameters=hf_config.rope_parameters,
            dtype=torch.float32,
        )
        return rotary.cos_sin_cache

    def attention(self, num_heads: int, num_kv_heads: int, head_dim: int, *, prefix: str) -> nn.Module:
        config = self.vllm_config
        device, dtype = torch.device(config.device_config.device), config.model_config.dtype
        return api.Attention(
            num_heads,
            head_dim,
            head_dim**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=self.vllm_config.cache_config,
            quant_config=self.quant_config,
            prefix=prefix,
            attn_backend=attention_backend(config.cache_config.cache_dtype, dtype, device),
        )

    def recurrent_core(self, config: Qwen3NextConfig, *, prefix: str) -> GatedDeltaNetState:
        return GatedDeltaNetState(config, self.vllm_config, prefix=prefix)

    def experts(self, config: Qwen3NextConfig, shared_expert: MLP | None, *, prefix: str) -> nn.Module:
        parallel = self.vllm_config.parallel_config
        return api.FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            quant_config=self.quant_config,
            prefix=prefix,
            enable_eplb=parallel.enable_eplb,
            num_redundant_experts=parallel.eplb_config.num_redundant_experts,
            **experts_options(self.vllm_config, shared_expert, prefix),
        )

    def linear_weight(self, linear: nn.Module) -> LinearWeight | None:
        return linear_weight(linear, self.tensor_parallel_size)

    def experts_weights(self, experts: Any) -> ExpertsWeights | None:
        return experts_weights(experts.routed_experts) if ours_alone(experts, self.vllm_config) else None

    def _linear(self, prefix: str, *, bias: bool = False) -> dict:
        return {"bias": bias, "return_bias": False, "quant_config": self.quant_config, "prefix": prefix}
