"""Block-wise FP8 and group-wise int4, whose linears and experts are ours on a CPU, where SGLang's need AMX or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qnext_kernels.fp8 import FP8_GROUP
from qnext_kernels.integers import INT_GROUPS
from qnext_plugins.model import (
    TRANSPOSED,
    IntegerWeights,
    as_compressed_tensors,
    fp8_shapes,
    integer_obstacle,
    modules_of,
    stored_names,
)
from qnext_plugins.packed_methods import expect_whole_groups
from qnext_sglang import UnsupportedEngineError, serving
from qnext_sglang import sglang_api as api

PASSED_ON = ("packed_modules_mapping", "hf_config")
"""What SGLang puts into a ``quantization_config``."""


class CpuFp8Config(api.Fp8Config):
    """Our kernels do not quantize activations, so that they may be in float32 too."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]


class IntegerScheme(api.CompressedTensorsWNA16):
    """Makes the parameters of a linear as SGLang does for Marlin; our method then takes its place.

    Args:
        bits: of a weight.
        group: columns of a row that share a scale.
    """

    def __init__(self, bits: int, group: int) -> None:
        super().__init__("group", bits, group)
        self.bits = bits

    def create_weights(
        self,
        layer: Any,
        output_size: int,
        input_size: int,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., None],
        **kwargs: Any,
    ) -> None:
        expect_whole_groups("weight", input_size_per_partition, self.group_size)

        def load(parameter: Tensor, loaded_weight: Tensor, *shard: Any) -> None:
            # SGLang refuses to round scales, which the kernels read in the dtype of the model.
            weight_loader(parameter, loaded_weight.to(parameter.dtype), *shard)

        sizes = (output_size, input_size, output_partition_sizes, input_size_per_partition)
        super().create_weights(layer, *sizes, params_dtype, load, **kwargs)


class CpuInt4Config(api.CompressedTensorsConfig):
    """Int4, with int8 beside it, that our kernels read, as compressed-tensors describes it; all else stays SGLang's.

    ``described``: the ``quantization_config`` of the checkpoint.
    """

    described: dict[str, Any]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        if (reason := integer_obstacle(config)) is not None:
            own = api.CPU_QUANTIZATION_METHODS[config["quant_method"]].from_config(config)
            own.left_because = reason
            return own
        kept = {name: config[name] for name in PASSED_ON if name in config}
        ours = super().from_config({**as_compressed_tensors(config), **kept})
        ours.described = config
        return ours

    @cached_property
    def integers(self) -> IntegerWeights:
        return IntegerWeights(self.described)

    def read_names(self, model: str, revision: str | None) -> None:
        """Take what the files of a checkpoint, a folder or a name on Hugging Face, hold as it is for left out."""
        if self.described["quant_method"] in TRANSPOSED:
            names = stored_names(model, revision)
            self.integers = IntegerWeights(as_compressed_tensors(self.described, names))

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]

    def get_linear_scheme(
        self, layer: Any, layer_name: str | None = None, matched_target: str | None = None
    ) -> IntegerScheme | None:
        """What a linear is made by, or None where it is not quantized.

        SGLang's own asks for a GPU's compute capability, and takes the end of a name in ``ignore`` for all of it.

        Raises:
            ValueError: linears that are loaded into one are not quantized alike.
        """
        bits = self.integers.bits_of_merged(layer_name or "", self.packed_modules_mapping)
        return None if bits is None else IntegerScheme(bits, self.integers.group)


def is_block_fp8(quant_config: Any) -> bool:
    """Whether a checkpoint is in FP8 with a scale for each block of 128 × 128."""
    block = quant_config.weight_block_size if isinstance(quant_config, api.Fp8Config) else None
    return block is not None and list(block) == [FP8_GROUP] * 2


def is_int4(quant_config: Any) -> bool:
    """Whether a checkpoint is in int4 with a scale for each group of columns, on our platform for CPUs."""
    return isinstance(quant_config, CpuInt4Config)


def ours_on_cpu(quant_config: Any) -> bool:
    """Whether whatever of this quantization the model has on a CPU is ours; on a GPU False."""
    return serving.device().type == "cpu" and (is_block_fp8(quant_config) or is_int4(quant_config))


def leaves_experts(quant_config: Any, prefix: str) -> bool:
    """Whether a quantized checkpoint has the experts of this name as they are."""
    if is_int4(quant_config):
        return quant_config.integers.bits(prefix) is None  # type: ignore[no-any-return]
    return isinstance(quant_config, api.Fp8Config) and api.is_layer_skipped(
        prefix, quant_config.ignored_layers, fused_mapping=quant_config.packed_modules_mapping
    )


def shapes_on_cpu(quant_config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of a checkpoint's tensors on a CPU in block-wise FP8 or in int4; else None.

    Args:
        quant_config: SGLang's.
        shapes: of the unquantized checkpoint's.
    """
    if not ours_on_cpu(quant_config):
        return None
    if is_int4(quant_config):
        return quant_config.integers.shapes(shapes)  # type: ignore[no-any-return]
    ignored = quant_config.ignored_layers
    return fp8_shapes(shapes, {module for module in modules_of(shapes) if api.is_layer_skipped(module, ignored)})


def expect_served(quant_config: Any) -> None:
    """Raise UnsupportedEngineError on a plain CPU where the model is quantized in another way."""
    if quant_config is None or not serving.on_plain_cpu() or ours_on_cpu(quant_config):
        return
    block = getattr(quant_config, "weight_block_size", None)
    found = quant_config.get_name() if block is None else f"{quant_config.get_name()} in blocks of {block}"
    if (reason := getattr(quant_config, "left_because", None)) is not None:
        found += f": {reason}"
    raise UnsupportedEngineError(
        f"qnext-plugins on a CPU: the weights are quantized ({found}), and it serves FP8 in blocks of "
        f"{[FP8_GROUP] * 2}, int4 in groups of {', '.join(map(str, INT_GROUPS))} (compressed-tensors, GPTQ or "
        "AutoRound, symmetric) or unquantized ones"
    )
