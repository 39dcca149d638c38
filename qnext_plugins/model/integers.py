"""Weights in group-wise integers (W4A16 and W8A16): which of a checkpoint's linears are, and in how many bits.

Sources: the ``config_groups`` and ``ignore`` of compressed-tensors, as vLLM and SGLang read them; GPTQ and AutoRound in
the same words (:mod:`.gptq`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from qnext_kernels.integers import INT_GROUPS
from qnext_plugins.model.config import CheckpointError
from qnext_plugins.model.gptq import BESIDE_GPTQ, WORD_BITS, as_compressed_tensors
from qnext_plugins.model.weights import EXPERTS, is_linear_weight, modules_of

PACKED = "pack-quantized"
BESIDE_INTEGERS = ("sparsity_config", "kv_cache_scheme", "transform_config", "linear_fp8_config", *BESIDE_GPTQ)
"""What a ``quantization_config`` may ask for beside integers, which our kernels do not do."""
PATTERN = "re:"
"""Begins a regular expression in ``ignore`` and ``targets``, which is matched from a name's start."""
LINEARS = "Linear"
"""Stands for all linears in ``targets``."""
EXPERT_LINEARS = ("gate_proj", "up_proj", "down_proj")


def integer_obstacle(quantization: Mapping[str, Any] | None) -> str | None:
    """Why what a ``quantization_config`` describes is not int4 that our kernels read, or None.

    They read compressed-tensors' ``pack-quantized``, symmetric and in groups of one size: int4 (W4A16) for all linears
    that are not ignored, or int8 (W8A16) for those that ``targets`` name; and what :func:`as_compressed_tensors` says
    the same of.
    """
    described = as_compressed_tensors(quantization or {})
    method, layout = described.get("quant_method"), described.get("format")
    if (method, layout) != ("compressed-tensors", PACKED):
        return f"quant_method is {method}" if method != "compressed-tensors" else f"format is {layout}"
    if given := [name for name in BESIDE_INTEGERS if described.get(name)]:
        return f"{given[0]} is given"
    groups = described.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return "there are no config_groups"
    sizes = []
    for scheme in groups.values():
        if (reason := _scheme_obstacle(scheme)) is not None:
            return reason
        sizes.append(scheme["weights"]["group_size"])
    return f"group_size is {sizes[0]} and {max(set(sizes) - {sizes[0]})}" if len(set(sizes)) > 1 else None


def _scheme_obstacle(scheme: Any) -> str | None:
    """The same of one of the ``config_groups``."""
    weights = scheme.get("weights") if isinstance(scheme, Mapping) else None
    if not isinstance(weights, Mapping):
        return "weights are not described"
    if given := [name for name in ("input_activations", "output_activations") if scheme.get(name)]:
        return f"{given[0]} is given"
    if not (targets := scheme.get("targets")):
        return "targets are not given"
    named = targets != [LINEARS]
    # What has no dot is a class of modules.
    if classes := [target for target in targets if named and "." not in str(target)]:
        return f"targets is {classes}"
    # What is left out has the defaults of compressed-tensors; "static" and "weight" order nothing anew at run time.
    served = {
        "format": (scheme.get("format"), (None, PACKED)),
        "num_bits": (weights.get("num_bits"), (4, 8) if named else (4,)),
        "type": (weights.get("type", "int"), ("int",)),
        "symmetric": (weights.get("symmetric", True), (True,)),
        "strategy": (weights.get("strategy"), (None, "group")),
        "group_size": (weights.get("group_size"), INT_GROUPS),
        "actorder": (weights.get("actorder"), (None, False, "static", "weight")),
        "dynamic": (weights.get("dynamic"), (None, False)),
    }
    return next((f"{name} is {value}" for name, (value, read) in served.items() if value not in read), None)


class IntegerWeights:
    """How a checkpoint stores its linears in integers.

    Args:
        quantization: a ``quantization_config`` without an :func:`integer_obstacle`.
    """

    def __init__(self, quantization: Mapping[str, Any]) -> None:
        described = as_compressed_tensors(quantization)
        schemes = list(described["config_groups"].values())
        self.group: int = schemes[0]["weights"]["group_size"]
        """Columns of a row that share a scale."""
        self._ignored = _Entries("ignore", described.get("ignore") or ())
        numbers = [(scheme["targets"], int(scheme["weights"]["num_bits"])) for scheme in schemes]
        self._named = [(_Entries("targets", targets), bits) for targets, bits in numbers if targets != [LINEARS]]
        self._of_others = next((bits for targets, bits in numbers if targets == [LINEARS]), None)
        self._bits: dict[str, int | None] = {}

    @classmethod
    def of(cls, quantization: Mapping[str, Any] | None) -> IntegerWeights | None:
        """What a ``quantization_config`` says, where it has no :func:`integer_obstacle`; else None."""
        return None if quantization is None or integer_obstacle(quantization) is not None else cls(quantization)

    def bits(self, module: str) -> int | None:
        """How many a module's weights have; None of one that is not quantized. See NEVER_QUANTIZED for others.

        An entry covers the linear that it names, or those whose name its pattern fits, and not what lies in a module
        that it names: this is how compressed-tensors and the engines read it.

        Args:
            module: a linear, or the experts of a layer (:func:`modules_of`), which are left out where one of them is.

        Raises:
            CheckpointError: a pattern is none, or linears of an expert differ.
        """
        layer, experts, _ = f"{module}.".partition(EXPERTS)
        name = f"{layer}{EXPERTS[:-1]}" if experts else module
        if name not in self._bits:
            # As the engines do, the first expert is looked at for all of them.
            linears = [f"{name}.0.{last}" for last in EXPERT_LINEARS] if experts else [name]
            ignored = name in self._ignored.experts or any(map(self._ignored.cover, linears))
            found = {None} if ignored else {self._scheme(linear) for linear in linears}
            if len(found) > 1:
                raise CheckpointError(f"config.json: targets: expected {', '.join(linears)} in as many bits each")
            (self._bits[name],) = found
        return self._bits[name]

    def _scheme(self, linear: str) -> int | None:
        return next((bits for entries, bits in self._named if entries.cover(linear)), self._of_others)

    def bits_of_merged(self, name: str, parts: Mapping[str, Sequence[str]]) -> int | None:
        """:meth:`bits` of an engine's linear.

        Args:
            name: of the linear.
            parts: for the last part of a merged linear's name, those of what is loaded into it.

        Raises:
            ValueError: these are not quantized alike.
        """
        head, _, last = name.rpartition(".")
        found = {part: self.bits(f"{head}.{part}" if head else part) for part in parts.get(last, [last])}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{part} {'not quantized' if bits is None else bits}" for part, bits in found.items())
            raise ValueError(f"{name}: expected as many bits for all that is loaded into it, got {listed}")
        return next(iter(found.values()))

    def shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Those of the checkpoint: in place of a linear's weight words, scales of groups, and its shape.

        Args:
            shapes: of :func:`expected_shapes`.
        """
        stored: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            bits = self.bits(name.removesuffix(".weight")) if is_linear_weight(name, shape) else None
            stored |= {name: shape} if bits is None else packed_shapes(name, shape, self.group, bits)
        return stored


class _Entries:
    """Names and patterns of linears.

    ``field``: of the ``quantization_config`` that has them.
    """

    def __init__(self, field: str, entries: Iterable[Any]) -> None:
        texts = [str(entry) for entry in entries]
        self._field, self._texts = field, [text for text in texts if text.startswith(PATTERN)]
        self._names = set(texts) - set(self._texts)
        self.experts = modules_of(
            f"{name}.weight" for name in self._names if EXPERTS in name and name.endswith(EXPERT_LINEARS)
        )
        """The experts of layers in which one is named."""

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [_pattern(self._field, text) for text in self._texts]

    def cover(self, linear: str) -> bool:
        return linear in self._names or any(pattern.match(linear) for pattern in self._patterns)


def _pattern(field: str, entry: str) -> re.Pattern[str]:
    try:
        return re.compile(entry.removeprefix(PATTERN))
    except re.error as error:
        raise CheckpointError(f"config.json: {field}: expected a pattern, got {entry} ({error})") from None


def packed_shapes(name: str, shape: tuple[int, ...], group: int, bits: int = 4) -> dict[str, tuple[int, ...]]:
    """The three tensors that a weight [N, K] is in so many bits."""
    rows, columns = shape
    return {
        f"{name}_packed": (rows, -(-columns * bits // WORD_BITS)),
        f"{name}_scale": (rows, -(-columns // group)),
        f"{name}_shape": (2,),
    }
