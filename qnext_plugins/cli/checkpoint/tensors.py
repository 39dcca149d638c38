"""The values of one tensor of a checkpoint, by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from qnext_plugins.cli.checkpoint.spec import FP8_BLOCK, Spec
from qnext_plugins.cli.checkpoint.streams import generator
from qnext_plugins.cli.checkpoint.structure import Structure
from qnext_plugins.model.weights import EXPERTS

DISTURBANCE = 0.1
"""Root mean square, in embeddings', of all that a structured model's layers may add to the residual stream."""
INTO_THE_STREAM = ("o_proj", "out_proj", "down_proj")
QUANTIZED = (*INTO_THE_STREAM, "q_proj", "k_proj", "v_proj", "in_proj_qkvz", "gate_proj", "up_proj")
FP8 = torch.float8_e4m3fn
LARGEST_FP8 = torch.finfo(FP8).max

Shape = tuple[int, ...]

ALL_BUT_EXPERTS = (rf"re:(?!.*{re.escape(EXPERTS)}).*",)
"""As ``targets``: the linears that :func:`in_int8` has."""


def is_quantized(name: str) -> bool:
    """Whether a quantized checkpoint holds this tensor in FP8 or int4, as the published ones do."""
    return name.endswith(".weight") and name.split(".")[-2] in QUANTIZED


def in_int8(name: str) -> bool:
    """Whether AutoRound's mixed checkpoints hold this linear's weight in int8, beside experts in int4."""
    return EXPERTS not in name


def describe_fp8(left_out: Iterable[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a block-wise FP8 checkpoint that has these modules otherwise."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": list(left_out),
        "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }


def describe_int4(left_out: Iterable[str], group: int, in_int8: Sequence[str] = ()) -> dict[str, Any]:
    """The ``quantization_config`` of an int4 checkpoint of compressed-tensors that has these modules otherwise.

    ``in_int8``: targets, names and patterns of linears, that are in int8.
    """
    weights: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": group,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group",
        "symmetric": True,
        "type": "int",
    }
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    groups = {"group_0": scheme}
    if in_int8:
        groups["group_1"] = scheme | {"targets": list(in_int8), "weights": weights | {"num_bits": 8}}
    return {
        "config_groups": groups,
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": list(left_out),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a matrix [N, K] of multiples of 128 in blocks of 128 × 128.

    Returns:
        float8_e4m3fn [N, K] and its scales [N / 128, K / 128] bfloat16, which the values are to be multiplied with.
    """
    rows, columns = (size // FP8_BLOCK for size in weight.shape)
    blocks = weight.float().view(rows, FP8_BLOCK, columns, FP8_BLOCK)
    scales = (blocks.abs().amax(dim=(1, 3)) / LARGEST_FP8).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    scaled = (blocks / scales.float()[:, None, :, None]).clamp(-LARGEST_FP8, LARGEST_FP8)
    return scaled.view(weight.shape).to(FP8), scales


class Values:
    """Makes the tensors of a checkpoint, each from its name alone.

    Args:
        spec: of the checkpoint.
        structure: of a structured one.
    """

    def __init__(self, spec: Spec, structure: Structure | None) -> None:
        self.spec, self.structure = spec, structure
        self.dtype: torch.dtype = getattr(torch, spec.dtype)

    def make(self, name: str, shape: Shape) -> Tensor:
        """The tensor ``name`` in the checkpoint's dtype, unquantized."""
        structured = self.structure
        if structured is not None and name == "model.embed_tokens.weight":
            return structured.embedding(self.dtype)
        if structured is not None and name == "lm_head.weight":
            return structured.head(self.dtype)
        noise = self.noise(name, shape)
        if structured is not None and name == "mtp.fc.weight":
            return torch.cat([structured.fc(), noise[:, shape[0] :] * DISTURBANCE * shape[0] ** -0.5], dim=1).to(
                self.dtype
            )
        return self._parameter(name, shape, noise).to(self.dtype)

    def noise(self, name: str, shape: Shape) -> Tensor:
        """float32 of a standard normal distribution, the same for the same name."""
        return torch.randn(shape, generator=generator(self.spec.seed, name))

    def _parameter(self, name: str, shape: Shape, noise: Tensor) -> Tensor:
        module = name.split(".")[-2]
        if name.endswith("A_log"):
            return torch.empty(shape).uniform_(0.01, 16, generator=generator(self.spec.seed, f"{name}:decay")).log_()
        if name.endswith("dt_bias"):
            return 1 + 0.2 * noise
        if name.endswith("linear_attn.norm.weight"):
            return 1 + 0.05 * noise
        if "norm" in module:
            # The last norm of a model and of its draft scales what the head compares: it stays neutral.
            return 0.05 * noise if ".layers." in name else torch.zeros(shape)
        if module == "conv1d":
            return 0.4 * noise
        if module == "embed_tokens":
            return noise
        return noise * self._gain(name, module) * shape[-1] ** -0.5

    def _gain(self, name: str, module: str) -> float:
        """Root mean square of a linear's outputs, of inputs of 1."""
        if self.structure is None or module not in INTO_THE_STREAM:
            return 1.0
        layers = 1 if name.startswith("mtp.") else self.spec.widths.num_hidden_layers
        return DISTURBANCE * (2 * layers) ** -0.5
