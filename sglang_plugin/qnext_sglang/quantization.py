"""Block-wise FP8 and group-wise int4, whose linears and experts are ours on a CPU, where SGLang's need AMX or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qnext_kernels.fp8 import FP8_GROUP
from qnext_kernels.integers import INT_GROUPS
from qnext_plugins.model import (
    as_compressed_tensors,
    fp8_shapes,
    int4_group,
    int4_obstacle,
    int4_shapes,
    left_out_of_int4,
    modules_of,
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


class Int4Scheme(api.CompressedTensorsWNA16):
    """Makes the parameters of a linear as SGLang does for Marlin; our method then takes its place."""

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
    """Int4 that our kernels read, as compressed-tensors describes it; what else it may be stays SGLang's."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        if (reason := int4_obstacle(config)) is not None:
            own = api.CPU_QUANTIZATION_METHODS[config["quant_method"]].from_config(config)
            own.left_because = reason
            return own
        kept = {name: config[name] for name in PASSED_ON if name in config}
        return super().from_config({**as_compressed_tensors(config), **kept})

    @property
    def group(self) -> int:
        """Columns of a row that share a scale."""
        group = int4_group(self.config)
        assert group is not None
        return group

    def left_out(self, modules: Iterable[str]) -> set[str]:
        """Those of these modules that are not quantized."""
        return left_out_of_int4(self.config, modules)

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]

    def get_linear_scheme(
        self, layer: Any, layer_name: str | None = None, matched_target: str | None = None
    ) -> Int4Scheme | None:
        """What a linear is made by, or None where it is not quantized.

        SGLang's own asks for a GPU's compute capability, and takes the end of a name in ``ignore`` for all of it.

        Raises:
            ValueError: only some of the linears that are loaded into one are quantized.
        """
        head, _, last = (layer_name or "").rpartition(".")
        parts = {f"{head}.{part}" for part in self.packed_modules_mapping.get(last, [last])}
        left_out = self.left_out(parts)
        if left_out == parts:
            return None
        if left_out:
            raise ValueError(f"{', '.join(sorted(left_out))}: not quantized, unlike what is loaded with it")
        return Int4Scheme("group", 4, self.group)


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
        return bool(quant_config.left_out([prefix]))
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
    modules = modules_of(shapes)
    if is_int4(quant_config):
        return int4_shapes(shapes, quant_config.left_out(modules), quant_config.group)
    ignored = quant_config.ignored_layers
    return fp8_shapes(shapes, {module for module in modules if api.is_layer_skipped(module, ignored)})


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
