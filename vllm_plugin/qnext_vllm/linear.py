"""vLLM's linears and heads on our kernel, unquantized and, on a CPU, in block-wise FP8 or group-wise int4."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qnext_kernels import linear
from qnext_kernels.fp8 import FP8_GROUP
from qnext_plugins.model import IntegerWeights, as_compressed_tensors, integer_obstacle, is_block_fp8
from qnext_plugins.model.gptq import WORD_BITS
from qnext_plugins.packed_methods import (
    Fp8Linear,
    Int4Linear,
    Int8Linear,
    PackedLinear,
    expect_whole_groups,
    prepare,
    replace_method,
)
from qnext_vllm import vllm_api as api


class _PlainTensors(PackedLinear):
    """Reads weight and scales as plain tensors: vLLM's parameters pass operators that get one through Python twice."""

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        for plain, tensor in zip(("plain_weight", "plain_scale"), self.tensors(layer), strict=False):
            layer.register_buffer(plain, tensor.data, persistent=False)


class QnextLinearMethod(_PlainTensors, api.UnquantizedLinearMethod):
    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.plain_weight, bias, layer.packed)


class _ScaledLinearMethod(_PlainTensors, api.LinearMethodBase):
    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.plain_weight, bias, layer.packed, layer.plain_scale)


class QnextHeadMethod(PackedLinear, api.UnquantizedEmbeddingMethod):
    pass


OURS = {api.UnquantizedLinearMethod: QnextLinearMethod, api.UnquantizedEmbeddingMethod: QnextHeadMethod}


def on_our_kernel(layer: Any, packable: bool = True) -> Any:
    """``layer`` with our method, where our kernel for linears serves its weight and it is not quantized.

    ``packable``: nothing but this layer reads its weight.
    """
    return replace_method(layer, OURS, packable)


@api.register_weight_loader_v2_supported_method
class QnextFp8LinearMethod(_ScaledLinearMethod, Fp8Linear):
    """The parameters of vLLM's method of block-wise FP8, whose kernels for CPUs need AMX, on our kernel."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Any,
    ) -> None:
        """Make the weight and its scales.

        Raises:
            ValueError: a matrix of several, or a rank's part of one, is not whole blocks.
        """
        expect_whole_blocks(layer.prefix, input_size_per_partition, output_partition_sizes, input_size, output_size)
        block = layer.weight_block_size = [FP8_GROUP, FP8_GROUP]  # which vLLM's loading of scales asks for
        weight = api.create_fp8_weight_parameter(sum(output_partition_sizes), input_size_per_partition, weight_loader)
        layer.register_parameter("weight", weight)
        sizes = output_partition_sizes, input_size_per_partition
        scale = api.create_fp8_scale_parameter(api.BlockQuantScaleParameter, *sizes, block, weight_loader)
        layer.register_parameter("weight_scale_inv", scale)
        prepare(layer, packable=True)


class _IntegerLinearMethod(_ScaledLinearMethod):
    """The parameters of vLLM's method of compressed-tensors' W4A16 and W8A16, on our kernel.

    Args:
        group: columns of a row that share a scale.
    """

    bits: int

    def __init__(self, group: int) -> None:
        self.group = group

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Any,
    ) -> None:
        """Make the weight, its scales, and the tensor in which a checkpoint has its shape.

        Raises:
            ValueError: a row of a rank's part is not whole groups.
        """
        expect_whole_groups(layer.prefix, input_size_per_partition, self.group)
        rows, axes = sum(output_partition_sizes), {"output_dim": 0, "input_dim": 1, "weight_loader": weight_loader}
        per_word = WORD_BITS // self.bits
        words = torch.empty(rows, input_size_per_partition // per_word, dtype=torch.int32)
        packed = api.PackedvLLMParameter(data=words, packed_dim=1, packed_factor=per_word, **axes)
        scales = torch.empty(rows, input_size_per_partition // self.group, dtype=params_dtype)
        layer.register_parameter("weight_packed", packed)
        layer.register_parameter("weight_scale", api.GroupQuantScaleParameter(data=scales, **axes))
        shape = api.BasevLLMParameter(data=torch.empty(2, dtype=torch.int64), weight_loader=weight_loader)
        layer.register_parameter("weight_shape", shape)
        prepare(layer, packable=True)


@api.register_weight_loader_v2_supported_method
class QnextInt4LinearMethod(_IntegerLinearMethod, Int4Linear):
    bits = 4


@api.register_weight_loader_v2_supported_method
class QnextInt8LinearMethod(_IntegerLinearMethod, Int8Linear):
    bits = 8


def expect_whole_blocks(name: str, inputs: int, outputs: Sequence[int], all_inputs: int, all_outputs: int) -> None:
    """Raise ValueError where a scale would be that of two matrices, or of what two ranks have.

    vLLM itself lets the parts of a merged linear through, and puts their scales beside them.

    Args:
        name: of the linear.
        inputs: columns of a rank's weight.
        outputs: rows of each matrix in it, one below the other.
        all_inputs, all_outputs: columns and rows of all ranks.
    """
    rows = list(outputs) if sum(outputs) < all_outputs else list(outputs[:-1])
    columns = [inputs] if inputs < all_inputs else []
    for size, kind in [(size, "rows") for size in rows] + [(size, "columns") for size in columns]:
        if size % FP8_GROUP:
            raise ValueError(
                f"{name}: expected whole blocks of {FP8_GROUP} {kind} in FP8 for each matrix of a rank, got {size}; "
                "with fewer ranks there may be"
            )


class CpuFp8Config(api.Fp8Config):
    """vLLM's block-wise FP8, with linears on our kernel, which serves activations in float32 too."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        method = super().get_quant_method(layer, prefix)
        return QnextFp8LinearMethod() if type(method) is api.Fp8LinearMethod else method


def leaves_out(config: Any, module: str) -> bool:
    """Whether a checkpoint in FP8 or int4 has a module otherwise: it lists it, or what vLLM merges it into."""
    if isinstance(config, CpuInt4Config):
        return config.integers.bits(module) is None
    parent, _, name = module.rpartition(".")
    merged = [whole for whole, parts in config.packed_modules_mapping.items() if name in parts]
    return any(
        api.is_layer_skipped(f"{parent}.{each}", config.ignored_layers, match_mode=config.ignored_layers_match_mode)
        for each in (name, *merged)
    )


def cpu_fp8_config(described: dict[str, Any] | None) -> CpuFp8Config | None:
    """What a checkpoint's ``quantization_config`` describes, where that is FP8 in blocks of 128 × 128; else None."""
    if described is None or not is_block_fp8(described):
        return None
    config = CpuFp8Config.from_config(described)
    return None if config.store_dtype else config


class CpuInt4Config(api.CompressedTensorsConfig):
    """Group-wise int4, with int8 beside it, as compressed-tensors describes it, on our kernels.

    vLLM's experts in int4 on a CPU need AMX; ours are in :mod:`qnext_vllm.experts`.
    """

    config: dict[str, Any]

    @cached_property
    def integers(self) -> IntegerWeights:
        return IntegerWeights(self.config)

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Our method of a linear; vLLM's of what else a layer may be.

        Raises:
            ValueError: what is loaded into a linear is not quantized alike.
        """
        if not isinstance(layer, api.LinearBase):
            return super().get_quant_method(layer, prefix)
        bits = self.integers.bits_of_merged(prefix, self.packed_modules_mapping)
        if bits is None:
            return api.UnquantizedLinearMethod()
        return (QnextInt4LinearMethod if bits == 4 else QnextInt8LinearMethod)(self.integers.group)


def cpu_int4_config(described: dict[str, Any] | None, names: Collection[str] = ()) -> CpuInt4Config | None:
    """What a checkpoint's ``quantization_config`` describes, where our kernels read its int4; else None.

    ``names``: of :func:`as_compressed_tensors`.
    """
    if described is None or integer_obstacle(described) is not None:
        return None
    return CpuInt4Config.from_config(dict(as_compressed_tensors(described, names)))


OURS_ON_CPU = (CpuFp8Config, CpuInt4Config)
"""Configurations whose linears and experts are all on our kernels."""
