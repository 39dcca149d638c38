"""vLLM's linears and heads on our kernel, unquantized and, on a CPU, in block-wise FP8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qnext_kernels import linear
from qnext_kernels.fp8 import FP8_GROUP
from qnext_plugins.model import is_block_fp8
from qnext_plugins.packed_methods import Fp8Linear, PackedLinear, prepare, replace_method
from qnext_vllm import vllm_api as api


class QnextLinearMethod(PackedLinear, api.UnquantizedLinearMethod):
    """Reads the weight as a plain tensor: vLLM's parameters pass every operator that gets one through Python twice."""

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        layer.register_buffer("plain_weight", layer.weight.data, persistent=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.plain_weight, bias, layer.packed)


class QnextHeadMethod(PackedLinear, api.UnquantizedEmbeddingMethod):
    pass


OURS = {api.UnquantizedLinearMethod: QnextLinearMethod, api.UnquantizedEmbeddingMethod: QnextHeadMethod}


def on_our_kernel(layer: Any, packable: bool = True) -> Any:
    """``layer`` with our method, where our kernel for linears serves its weight and it is not quantized.

    ``packable``: nothing but this layer reads its weight.
    """
    return replace_method(layer, OURS, packable)


@api.register_weight_loader_v2_supported_method
class QnextFp8LinearMethod(Fp8Linear, api.LinearMethodBase):
    """The parameters of vLLM's method of block-wise FP8, whose kernels for CPUs need AMX, on our kernel.

    Reads them as plain tensors, as :class:`QnextLinearMethod` does.
    """

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

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        layer.register_buffer("plain_weight", layer.weight.data, persistent=False)
        layer.register_buffer("plain_scale", layer.weight_scale_inv.data, persistent=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.plain_weight, bias, layer.packed, layer.plain_scale)


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
        return [*super().get_supported_act_dtypes(), torch.float32]

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        method = super().get_quant_method(layer, prefix)
        return QnextFp8LinearMethod() if type(method) is api.Fp8LinearMethod else method


def leaves_out(config: api.Fp8Config, module: str) -> bool:
    """Whether a checkpoint in FP8 has a module otherwise: it lists it, or what vLLM merges it into."""
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
