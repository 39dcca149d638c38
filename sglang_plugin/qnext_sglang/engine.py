"""SGLang's parts behind the port of the shared model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qnext_kernels import ExpertsWeights, LinearWeight
from qnext_plugins.gpus import joins
from qnext_plugins.model import MLP, ConfigError, CoreWeights, Qwen3NextConfig, RMSNorm
from qnext_plugins.model.gated_delta_net import GatedDeltaNetCore
from qnext_plugins.model.sharding import sharded_parameter
from qnext_plugins.packed_methods import experts_weights, linear_weight
from qnext_sglang import serving
from qnext_sglang import sglang_api as api
from qnext_sglang.experts import QnextFusedMoE
from qnext_sglang.linear import on_our_kernel
from qnext_sglang.loading import rope_parameters


class _OutputOnly:
    """SGLang's linears return (output, bias); the port wants the output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]  # type: ignore[misc]


class ColumnLinear(_OutputOnly, api.ColumnParallelLinear):
    pass


class JoinedColumnLinear(_OutputOnly, api.MergedColumnParallelLinear):
    pass


class GateUpLinear(JoinedColumnLinear):
    pass


class QKVLinear(_OutputOnly, api.QKVParallelLinear):
    pass


class RowLinear(_OutputOnly, api.RowParallelLinear):
    pass


class ReplicatedLinear(_OutputOnly, api.ReplicatedLinear):
    pass


class SummingRMSNorm(RMSNorm):
    """Sums its input over the ranks where a residual comes with it: in FlashInfer's kernel where SGLang would."""

    scale: Tensor

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        # 1 + weight, which that kernel takes in the dtype of the model.
        self.register_buffer("scale", torch.ones(size), persistent=False)
        self.weight.weight_loader = self._load  # type: ignore[attr-defined]

    def _load(self, weight: Tensor, loaded_weight: Tensor) -> None:
        api.default_weight_loader(weight, loaded_weight)
        self.scale.copy_(weight).add_(1.0)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return super().forward(x)
        if api.flashinfer_ar_fusion_applies(x.shape[0]):
            # None where the kernel declines.
            normed, total = api.flashinfer_allreduce_residual_rmsnorm(x, residual, self.scale, self.eps)
            if normed is not None:
                return normed, total
        return super().forward(api.tensor_model_parallel_all_reduce(x), residual)


def norms_sum(ranks: int) -> bool:
    """Whether sums over ``ranks`` are left to the norms behind them."""
    return ranks > 1 and api.get_exec().comm.flashinfer_allreduce_fusion_backend is not None


class SglangEngine:
    """Implements :class:`qnext_plugins.model.Engine` with SGLang's parallel layers, quantization and caches."""

    def __init__(self, hf_config: Any, quant_config: Any) -> None:
        self.hf_config = hf_config
        self.quant_config = quant_config
        self.tensor_parallel_size: int = api.get_parallel().tp_size
        self._rank = {"rank": api.get_parallel().tp_rank, "ranks": self.tensor_parallel_size}
        # A bias is added behind the sum.
        self._norms_sum = norms_sum(self.tensor_parallel_size) and not getattr(hf_config, "attention_bias", False)
        self.batch = CurrentBatch()

    def column_linear(self, input_size: int, output_size: int, *, prefix: str) -> nn.Module:
        return self._linear(ColumnLinear, input_size, output_size, prefix=prefix)

    def joined_column_linear(self, input_size: int, output_sizes: tuple[int, ...], *, prefix: str) -> nn.Module | None:
        if self.quant_config is not None or not joins(serving.device(), output_sizes, self.tensor_parallel_size):
            return None
        return self._linear(JoinedColumnLinear, input_size, list(output_sizes), prefix=prefix)

    def gate_up_linear(self, input_size: int, intermediate_size: int, *, prefix: str) -> nn.Module:
        return self._linear(GateUpLinear, input_size, [intermediate_size] * 2, prefix=prefix)

    def qkv_linear(self, config: Qwen3NextConfig, *, prefix: str) -> nn.Module:
        heads = 2 * config.num_attention_heads, config.num_key_value_heads
        sizes = (config.hidden_size, config.head_dim, *heads)
        return self._linear(QKVLinear, *sizes, bias=config.attention_bias, prefix=prefix)

    def row_linear(
        self, input_size: int, output_size: int, *, reduce: bool, bias: bool = False, prefix: str
    ) -> nn.Module:
        reduce = reduce and not self._norms_sum
        return self._linear(RowLinear, input_size, output_size, reduce_results=reduce, bias=bias, prefix=prefix)

    def replicated_linear(self, input_size: int, output_size: int, *, quantized: bool, prefix: str) -> nn.Module:
        quantization = {} if quantized else {"quant_config": None}
        return self._linear(ReplicatedLinear, input_size, output_size, prefix=prefix, **quantization)

    def norm(self, size: int, eps: float) -> RMSNorm:
        return (SummingRMSNorm if self._norms_sum else RMSNorm)(size, eps)

    def conv_weight(self, segments: tuple[int, ...], kernel_size: int) -> nn.Parameter:
        return sharded_parameter(segments, 1, kernel_size, dtype=torch.get_default_dtype(), **self._rank)

    def head_parameter(self, num_heads: int) -> nn.Parameter:
        return sharded_parameter((num_heads,), dtype=torch.float32, **self._rank)

    def cos_sin(self, config: Qwen3NextConfig) -> Tensor:
        rope = self._rope_parameters
        rotary = api.get_rope(
            config.head_dim,
            rotary_dim=config.head_dim,
            max_position=self.hf_config.max_position_embeddings,
            base=rope["rope_theta"],
            rope_scaling=rope,
            partial_rotary_factor=rope["partial_rotary_factor"],
            dtype=torch.float32,
        )
        return rotary.cos_sin_cache

    def attention(self, num_heads: int, num_kv_heads: int, head_dim: int, *, prefix: str) -> nn.Module:
        return Attention(num_heads, num_kv_heads, head_dim, self.batch, layer_id(prefix), self.quant_config, prefix)

    def recurrent_core(self, config: Qwen3NextConfig, *, prefix: str) -> nn.Module:
        return RecurrentState(config, self.tensor_parallel_size, self.batch, layer_id(prefix))

    def experts(self, config: Qwen3NextConfig, shared_expert: MLP | None, *, prefix: str) -> nn.Module:
        options = {"layer_id": layer_id(prefix), "quant_config": self.quant_config, "prefix": prefix}
        return QnextFusedMoE(config, shared_expert, reduce=not self._norms_sum, **options)

    def linear_weight(self, linear: nn.Module) -> LinearWeight | None:
        # The kernels that take weights along do not sum.
        return None if self._norms_sum else linear_weight(linear, self.tensor_parallel_size)

    def experts_weights(self, experts: Any) -> ExpertsWeights | None:
        return experts_weights(experts) if experts.ours_alone else None

    @cached_property
    def _rope_parameters(self) -> dict[str, Any]:
        return rope_parameters(self.hf_config)

    def _linear(self, kind: type, *sizes: Any, prefix: str, **options: Any) -> nn.Module:
        """One of SGLang's linears, on our kernel.

        Raises:
            ConfigError: a rank's part of it is not whole blocks or groups of the quantization.
        """
        options = {"bias": False, "quant_config": self.quant_config, "prefix": prefix} | options
        try:
            linear = kind(*sizes, **options)
        except ValueError as error:
            raise ConfigError(f"{prefix} on {self.tensor_parallel_size} ranks: {error}") from error
        return on_our_kernel(linear)


class CurrentBatch:
    """The batch that the model runs: SGLang hands it to the model, its attention layers take it as an argument."""

    def __init__(self) -> None:
        self._batch: api.ForwardBatch | None = None

    @contextmanager
    def of(self, forward_batch: api.ForwardBatch) -> Iterator[None]:
        self._batch = forward_batch
        try:
            yield
        finally:
            self._batch = None

    def get(self) -> api.ForwardBatch:
        assert self._batch is not None, "an attention layer runs outside the model's forward"
        return self._batch


class Attention(nn.Module):
    """SGLang's paged attention: :class:`qnext_plugins.model.port.PagedAttention`."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        batch: CurrentBatch,
        layer: int,
        quant_config: Any,
        prefix: str,
    ) -> None:
        super().__init__()
        self._batch = batch
        self.attn = api.RadixAttention(
            num_heads,
            head_dim,
            head_dim**-0.5,
            num_kv_heads=num_kv_heads,
            layer_id=layer,
            quant_config=quant_config,
            prefix=prefix,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attn(q, k, v, self._batch.get())


class RecurrentState(nn.Module):
    """A layer's place in SGLang's pool of recurrent states: :class:`qnext_plugins.model.port.RecurrentCore`.

    The layer's own weights ride along to the attention backend on SGLang's ``RadixLinearAttention``, and so do the
    projections, as its ``mixed_qkv`` and its ``a``.
    """

    def __init__(self, config: Qwen3NextConfig, ranks: int, batch: CurrentBatch, layer: int) -> None:
        super().__init__()
        self._batch = batch
        key_heads = config.linear_num_key_heads // ranks
        self.attn = api.RadixLinearAttention(
            layer_id=layer,
            num_q_heads=key_heads,
            num_k_heads=key_heads,
            num_v_heads=config.linear_num_value_heads // ranks,
            head_q_dim=config.linear_key_head_dim,
            head_k_dim=config.linear_key_head_dim,
            head_v_dim=config.linear_value_head_dim,
        )
        self.attn.qnext_core = GatedDeltaNetCore(config.rms_norm_eps)

    def forward(self, qkvz: Tensor, ba: Tensor, weights: CoreWeights) -> Tensor:
        # Detached: as parameters they would be registered, and loaded, a second time.
        self.attn.qnext_weights = CoreWeights(*(weight.detach() for weight in weights))
        return self.attn(self._batch.get(), qkvz, ba, ba).view(qkvz.shape[0], -1)


def layer_id(prefix: str) -> int:
    """The number behind ``layers.`` in a parameter's prefix."""
    parts = prefix.split(".")
    return int(parts[parts.index("layers") + 1])
