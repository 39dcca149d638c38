"""Integers of GPTQ and AutoRound as compressed-tensors stores them: the same words, transposed.

Sources: GPTQModel's ``quantization_config`` with its ``dynamic`` rules, AutoRound's with its ``extra_config``, and how
vLLM reads both (``AutoGPTQConfig``, ``INCConfigParser``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qnext_plugins.model.config import CheckpointError

TRANSPOSED = ("gptq", "auto-round")
"""Each a ``quant_method`` whose words and scales lie transposed."""
STORED_IN_INT4 = ("compressed-tensors", *TRANSPOSED)
"""Each a ``quant_method`` that may be int4 which our kernels read."""
BESIDE_GPTQ = ("checkpoint_format", "packing_format", "lm_head", "dynamic", "extra_config")
"""What a ``quantization_config`` of theirs may ask for that compressed-tensors has no words for."""
WORD_BITS = 32
"""Of a number in which columns are stored."""
MIDDLES = {4: (0x77777777, -0x77777778), 8: (0x7F7F7F7F, -0x7F7F7F80)}
"""By their bits, words of zero points one below the middle, as GPTQ's first format stores them, and of the middle."""
UNQUANTIZED = 16
"""Bits, at least, of what AutoRound leaves as it is."""
NOT_IN_A_NAME = frozenset("*+?^$()[]{}|\\")
"""Characters by which AutoRound knows a pattern, which it looks for anywhere in a name."""


def as_compressed_tensors(quantization: Mapping[str, Any], names: Collection[str] = ()) -> Mapping[str, Any]:
    """What compressed-tensors would say of GPTQ's or AutoRound's int4; any other ``quantization_config`` as it is.

    What is in BESIDE_GPTQ and asks for something else than int4, and int8 for some linears, stands beside.

    Args:
        quantization: of a checkpoint.
        names: of its tensors, where they are known: GPTQ's files may hold linears as they are and not say so.
    """
    method = quantization.get("quant_method")
    if method not in TRANSPOSED:
        return quantization
    ignored, in_int8, beside = _gptq(quantization) if method == "gptq" else _auto_round(quantization)
    words = {name.removesuffix(".qweight") for name in names}
    ignored += sorted({name.removesuffix(".weight") for name in names if name.endswith(".weight")} - words)
    if quantization.get("lm_head"):
        beside["lm_head"] = True
    weights = {
        "num_bits": quantization.get("bits"),
        "type": quantization.get("data_type") or "int",
        "symmetric": quantization.get("sym", True),
        "strategy": "group",
        "group_size": quantization.get("group_size"),
        "actorder": "group" if quantization.get("desc_act") else None,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if in_int8:
        groups["group_1"] = {"targets": in_int8, "weights": weights | {"num_bits": 8}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
        "ignore": ignored,
        **beside,
    }


def _gptq(quantization: Mapping[str, Any]) -> tuple[list[str], list[str], dict[str, Any]]:
    """``ignore``, ``targets`` of int8, and what stands beside."""
    ignored: list[str] = []
    in_int8: list[str] = []
    beside: dict[str, Any] = {}
    for rule, changed in (quantization.get("dynamic") or {}).items():
        if rule.startswith("-:"):
            ignored.append(f"re:{rule[2:]}")
        elif _is_int8(changed, quantization):
            in_int8.append(f"re:{rule.removeprefix('+:')}")
        elif _differs(changed, quantization):
            beside["dynamic"] = rule
    named = [name for part in quantization.get("modules_in_block_to_quantize") or () for name in _list(part)]
    if named:
        ignored.append(rf"re:(?!.*\.(?:{'|'.join(map(re.escape, named))})$)")
    if (stored := quantization.get("checkpoint_format")) not in (None, "gptq", "gptq_v2"):
        beside["checkpoint_format"] = stored
    return ignored, in_int8, beside


def _auto_round(quantization: Mapping[str, Any]) -> tuple[list[str], list[str], dict[str, Any]]:
    """The same."""
    ignored: list[str] = []
    in_int8: list[str] = []
    beside: dict[str, Any] = {}
    for name, changed in (quantization.get("extra_config") or {}).items():
        is_pattern = NOT_IN_A_NAME & set(name)
        entries = [f"re:.*(?:{name})"] if is_pattern else [rf"re:(?:.*\.)?{re.escape(name)}$"]
        if changed.get("bits", 0) >= UNQUANTIZED:
            ignored += entries
        elif _is_int8(changed, quantization):
            in_int8 += entries
        elif _differs(changed, quantization):
            beside["extra_config"] = name
    if blocks := quantization.get("block_name_to_quantize"):
        named = blocks.split(",") if isinstance(blocks, str) else blocks
        ignored.append(rf"re:(?!(?:{'|'.join(map(re.escape, named))}))")
    if (stored := quantization.get("packing_format")) not in (None, "auto_round:auto_gptq", "auto_round:gptq"):
        beside["packing_format"] = stored
    return ignored, in_int8, beside


def _list(part: Any) -> list[str]:
    return [part] if isinstance(part, str) else list(part)


def _differs(changed: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether a rule for some modules changes how they are stored."""
    return any(
        name in changed and changed[name] != base.get(name) for name in ("bits", "group_size", "sym", "desc_act")
    )


def _is_int8(changed: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether such a rule changes nothing but that there are eight bits."""
    return changed.get("bits") == 8 and not _differs({**changed, "bits": base.get("bits")}, base)


def packed_names(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """What a tensor is called in the layout of compressed-tensors, with shapes; nothing if that has no such thing."""
    module, _, kind = name.rpartition(".")
    if kind == "qweight":
        return {f"{module}.weight_packed": shape[::-1], f"{module}.weight_shape": (2,)}
    if kind == "scales":
        return {f"{module}.weight_scale": shape[::-1]}
    return {} if kind in ("qzeros", "g_idx") else {name: shape}


def from_gptq(
    weights: Iterable[tuple[str, Tensor]], bits_of: Callable[[str], int | None]
) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on as compressed-tensors stores them, those of GPTQ and AutoRound transposed.

    Args:
        weights: names and tensors; ``qweight`` [K · bits / 32, N] int32, ``scales`` [K / group, N], ``qzeros``,
            ``g_idx`` [K].
        bits_of: a module's, ``IntegerWeights.bits``.

    Raises:
        CheckpointError: a zero point is not the middle, or columns of a group do not lie side by side.
    """
    for name, tensor in weights:
        module, _, kind = name.rpartition(".")
        bits = bits_of(module) or min(MIDDLES) if kind in ("qweight", "qzeros") else 0
        if kind == "qzeros" and not any(bool((tensor == middle).all()) for middle in MIDDLES[bits]):
            middle = 1 << bits - 1
            raise CheckpointError(
                f"checkpoint: tensor {name}: expected zero points of {middle}, as of symmetric weights"
            )
        if kind == "g_idx" and not _in_order(tensor):
            raise CheckpointError(f"checkpoint: tensor {name}: expected groups of columns that lie side by side")
        for new, shape in packed_names(name, tuple(tensor.shape)).items():
            if new == name:
                yield new, tensor
            elif new.endswith("_shape"):
                yield new, torch.tensor([tensor.shape[-1], tensor.shape[0] * WORD_BITS // bits])
            else:
                yield new, tensor.reshape(shape[::-1]).t().contiguous()


def _in_order(group_of_column: Tensor) -> bool:
    columns = torch.arange(len(group_of_column))
    groups = int(group_of_column[-1]) + 1 if len(columns) else 1
    return len(columns) % groups == 0 and torch.equal(group_of_column.long(), columns // max(len(columns) // groups, 1))
