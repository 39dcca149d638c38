"""Block-wise FP8, the one quantization whose linears and experts are ours on a CPU, where SGLang's own need AMX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qnext_kernels.fp8 import FP8_GROUP
from qnext_plugins.model import fp8_shapes, modules_of
from qnext_sglang import UnsupportedEngineError, serving
from qnext_sglang import sglang_api as api


class CpuFp8Config(api.Fp8Config):
    """Our kernels do not quantize activations, so that they may be in float32 too."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [*super().get_supported_act_dtypes(), torch.float32]


def is_block_fp8(quant_config: Any) -> bool:
    """Whether a checkpoint is in FP8 with a scale for each block of 128 × 128."""
    block = quant_config.weight_block_size if isinstance(quant_config, api.Fp8Config) else None
    return block is not None and list(block) == [FP8_GROUP] * 2


def ours_on_cpu(quant_config: Any) -> bool:
    """Whether whatever of this quantization the model has on a CPU is ours; on a GPU False."""
    return serving.device().type == "cpu" and is_block_fp8(quant_config)


def shapes_on_cpu(quant_config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of a checkpoint's tensors on a CPU in block-wise FP8; else None.

    Args:
        quant_config: SGLang's.
        shapes: of the unquantized checkpoint's.
    """
    if not ours_on_cpu(quant_config):
        return None
    ignored = quant_config.ignored_layers
    return fp8_shapes(shapes, {module for module in modules_of(shapes) if api.is_layer_skipped(module, ignored)})


def expect_served(quant_config: Any) -> None:
    """Raise UnsupportedEngineError on a plain CPU where the model is quantized in another way."""
    if quant_config is None or not serving.on_plain_cpu() or is_block_fp8(quant_config):
        return
    block = getattr(quant_config, "weight_block_size", None)
    found = quant_config.get_name() if block is None else f"{quant_config.get_name()} in blocks of {block}"
    raise UnsupportedEngineError(
        f"qnext-plugins on a CPU: the weights are quantized ({found}), and it serves FP8 in blocks of "
        f"{[FP8_GROUP] * 2} or unquantized ones"
    )
