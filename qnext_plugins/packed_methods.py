"""Linears, heads and experts of either engine on our kernels; on a CPU weights are packed once behind loading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from qnext_kernels import (
    OPERATIONS,
    ExpertsWeights,
    LinearWeight,
    experts,
    experts_fp8,
    experts_int4,
    linear,
    pack_experts_,
    pack_experts_fp8_,
    pack_experts_int4_,
    pack_weight_,
    unpack_experts_,
    unpack_experts_fp8_,
    unpack_experts_int4_,
    unpack_weight_,
    use_huge_pages,
)
from qnext_kernels.integers import INT4, INT4_PER_WORD, INT8
from qnext_plugins.model import MLP


class _Version:
    """Rises whenever weights of an engine are loaded or laid out anew."""

    number = 0

    def rise(self) -> None:
        self.number += 1


_version = _Version()


def weights_version() -> int:
    """A number that rises whenever weights of an engine are loaded or laid out anew."""
    return _version.number


def _pack(layer: Any, pack: Callable[[], bool]) -> None:
    """Pack the weights of a layer unless they are; those in the place of packed ones are not."""
    if not layer.packed or getattr(layer, "has_others", False):
        layer.packed = pack()
    layer.has_others = False


class PackedLinear:
    """Goes before an engine's unquantized method: creating and loading the weights stays the engine's."""

    parameters: tuple[str, ...] = ("weight",)
    """A layer's weight, and its scales if it has any."""
    packs: int = 1
    """How many of them, from the first on, :func:`qnext_kernels.pack_weight_` lays out anew."""

    def process_weights_after_loading(self, layer: Any) -> None:
        _version.rise()
        if not _of_packed_experts(layer):
            _pack(layer, lambda: layer.packable and pack_weight_(*packed_tensors(layer)))
        elif layer.has_others:
            for matrix in zip(*(tensor.chunk(layer.matrices) for tensor in packed_tensors(layer)), strict=True):
                pack_weight_(*matrix)
            layer.has_others = False

    def unpack(self, layer: Any) -> None:
        unpack_weight_(*packed_tensors(layer))

    @classmethod
    def tensors(cls, layer: Any) -> tuple[Tensor, ...]:
        """A layer's weight, and its scales if it has any, as the kernel reads them."""
        return tuple(getattr(layer, name) for name in cls.parameters)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight, *scale = self.tensors(layer)
        return linear(x, weight, bias, layer.packed, *scale)


class Fp8Linear(PackedLinear):
    """Goes before an engine's method of linears in block-wise FP8, on a CPU."""

    parameters = ("weight", "weight_scale_inv")


class Int4Linear(PackedLinear):
    """Goes before an engine's method of linears in group-wise int4, on a CPU."""

    parameters = ("weight_packed", "weight_scale")
    packs = 2


class Int8Linear(Int4Linear):
    """Goes before an engine's method of linears in group-wise int8, on a CPU."""

    @classmethod
    def tensors(cls, layer: Any) -> tuple[Tensor, ...]:
        words, scale = super().tensors(layer)
        return words.view(INT8), scale


def expect_whole_groups(name: str, columns: int, group: int) -> None:
    """Raise ValueError where a scale would be that of columns which two ranks have."""
    if columns % group:
        raise ValueError(
            f"{name}: expected whole groups of {group} columns on a rank, got {columns} columns; "
            "with fewer ranks there may be"
        )


def packed_tensors(layer: Any) -> tuple[Tensor, ...]:
    """What packing a linear of an engine writes."""
    method = layer.quant_method if isinstance(layer.quant_method, PackedLinear) else PackedLinear
    return tuple(tensor.data for tensor in method.tensors(layer)[: method.packs])


class PackedExperts:
    """Goes before an engine's unquantized method of routed experts, whose weights are laid out as the kernel's."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)  # type: ignore[misc]
        layer.packed = False
        use_huge_pages(layer.w13_weight, layer.w2_weight)

    def shared(self, layer: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """w13, w2 and gate of the shared expert that the kernel computes along, or None."""
        if layer.shared_expert[0] is None:
            return None
        linears = layer.shared_expert[0].linears()
        # On a CPU, once they have been loaded, vLLM's have a plain tensor of each (its QnextLinearMethod).
        up, down, gate = (getattr(linear, "plain_weight", linear.weight) for linear in linears)
        return up, down, gate[0]

    def process_weights_after_loading(self, layer: Any) -> None:
        _version.rise()
        _pack(layer, lambda: pack_experts_(*self._weights(layer)))

    def unpack(self, layer: Any) -> None:
        unpack_experts_(*self._weights(layer))

    def _weights(self, layer: Any) -> tuple[Tensor, Tensor, Any]:
        return layer.w13_weight.data, layer.w2_weight.data, _shared_tensors(layer)

    def run(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Σ of the experts, with the MLP of ``layer.shared_expert`` where the tuple has one."""
        weights = layer.w13_weight, layer.w2_weight
        return experts(x, *weights, topk_weights, topk_ids, layer.packed, self.shared(layer))


class ScaledExperts:
    """Goes before an engine's method of experts whose weights have scales, those of a shared one in the call too."""

    parameters: tuple[str, str, str, str]
    """A layer's w13 and w2, each with its scales behind it."""
    linear: type[PackedLinear]
    """Of a shared expert's linears that are stored alike, on a GPU."""
    pack_: Callable[..., bool]
    unpack_: Callable[..., None]

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)  # type: ignore[misc]
        self.prepare(layer)

    def prepare(self, layer: Any) -> None:
        layer.packed = False
        use_huge_pages(*self.weights(layer))

    def process_weights_after_loading(self, layer: Any) -> None:
        _version.rise()
        _pack(layer, lambda: type(self).pack_(*self._tensors(layer)))

    def unpack(self, layer: Any) -> None:
        type(self).unpack_(*self._tensors(layer))

    def weights(self, layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w13 and w2, each with its scales behind it."""
        w13, w13_scale, w2, w2_scale = (getattr(layer, name) for name in self.parameters)
        return w13, w13_scale, w2, w2_scale

    def shared(self, layer: Any) -> tuple[Tensor, ...] | None:
        """w13, w2, each with what scales it has behind it, and gate of the shared expert, or None."""
        if layer.shared_expert[0] is None:
            return None
        up, down, gate = layer.shared_expert[0].linears()
        gate_weight = getattr(gate, "plain_weight", gate.weight)[0]
        return *self._shared_weight(up), *self._shared_weight(down), gate_weight

    def _shared_weight(self, linear: Any) -> tuple[Tensor, ...]:
        method = linear.quant_method if isinstance(linear.quant_method, PackedLinear) else self.linear
        return _plain_tensors(linear, method)

    def _tensors(self, layer: Any) -> tuple[Any, ...]:
        return *(weight.data for weight in self.weights(layer)), _shared_tensors(layer)


class Fp8Experts(ScaledExperts):
    """In block-wise FP8; on a GPU weights and scales stay as they are loaded.

    There a kernel may want each up projection before its gate: then both are exchanged in place. On a CPU matrices are
    packed, and activations are not quantized: reading the weights is what takes the time.
    """

    parameters = ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv")
    linear, pack_, unpack_ = Fp8Linear, pack_experts_fp8_, unpack_experts_fp8_

    def run(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """As that of :class:`PackedExperts`; a shared expert is in FP8 too."""
        choice, quantize = (topk_weights, topk_ids), _quantizes(x.device, x.dtype)
        shared: Any = self.shared(layer)
        return experts_fp8(x, *self.weights(layer), *choice, layer.packed, shared, quantize)


class Int4Experts(ScaledExperts):
    """In group-wise int4, on a CPU; a shared expert may be in int8.

    Args:
        group: columns of a row that share a scale.
    """

    parameters = ("w13_weight_packed", "w13_weight_scale", "w2_weight_packed", "w2_weight_scale")
    linear, pack_, unpack_ = Int4Linear, pack_experts_int4_, unpack_experts_int4_

    def __init__(self, group: int, *args: Any) -> None:
        super().__init__(*args)
        self.group = group

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Give a layer the parameters of so many experts, as a checkpoint has them, with attributes for a loader.

        Raises:
            ValueError: a row of a rank's weights is not whole groups.
        """
        attributes["quant_method"] = "group"  # how the loaders of both engines take scales
        hidden, middle = hidden_size, intermediate_size_per_partition
        for name, rows, columns in (("w13", 2 * middle, hidden), ("w2", hidden, middle)):
            expect_whole_groups(f"{name} of the experts", columns, self.group)
            tensors = {
                "packed": torch.empty(num_experts, rows, columns // INT4_PER_WORD, dtype=INT4),
                "scale": torch.empty(num_experts, rows, columns // self.group, dtype=params_dtype),
                "shape": torch.empty(num_experts, 2),
            }
            for kind, tensor in tensors.items():
                parameter = nn.Parameter(tensor, requires_grad=False)
                for attribute, value in attributes.items():
                    setattr(parameter, attribute, value)
                layer.register_parameter(f"{name}_weight_{kind}", parameter)
        self.prepare(layer)

    def run(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """As that of :class:`PackedExperts`; a shared expert is in int4 too, in int8, or not quantized."""
        return experts_int4(x, *self.weights(layer), topk_weights, topk_ids, layer.packed, self.shared(layer))


def _shared_tensors(layer: Any) -> tuple[Tensor, ...] | None:
    """What is packed of the shared expert as it has just been loaded: what is kept beside may be of an earlier time.

    None too where the routed experts' come in the place of packed ones: those of the shared one come, or stay, apart.
    """
    if layer.shared_expert[0] is None or (layer.packed and layer.has_others):
        return None
    up, down, _ = layer.shared_expert[0].linears()
    return *packed_tensors(up), *packed_tensors(down)


def _quantizes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel for experts in block-wise FP8 quantizes activations: any but those made for a CPU does."""
    return device.type != "cpu" or OPERATIONS["moe"].select(device, dtype).name in ("triton", "flashinfer")


def _plain_tensors(layer: Any, method: PackedLinear | type[PackedLinear]) -> tuple[Tensor, ...]:
    """A linear's weight, and scales if any; once they have been loaded, vLLM's on a CPU have a plain tensor of each."""
    plain = zip(("plain_weight", "plain_scale"), method.tensors(layer), strict=False)
    return tuple(getattr(layer, name, tensor) for name, tensor in plain)


class LeftAsLoaded:
    """Goes before an engine's base of linears' methods, in place of one that lays weights out for a kernel of its own.

    The linear is not called: the launches of the routed experts read its weights.
    """

    supports_pre_processed_weights = True

    def __init__(self, quant_config: Any) -> None:
        self.quant_config = quant_config  # which SGLang's loading asks for

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the engine's method has created the weights")

    def process_weights_after_loading(self, layer: Any) -> None:
        pass

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError("the routed experts compute the shared one along")


def stored_as(shared_expert: MLP, *methods: type) -> bool:
    """Whether both projections of a shared expert have the same one of an engine's or our methods."""
    found = {type(layer.quant_method) for layer in shared_expert.linears()[:2]}  # type: ignore[attr-defined]
    return len(found) == 1 and found <= set(methods)


def compute_along(layer: Any, shared_expert: MLP | None) -> None:
    """Give routed experts the shared one that their kernel computes along, if any."""
    # Held in tuples: both are children of the block.
    layer.shared_expert = (shared_expert,)
    if shared_expert is not None:
        linears: Iterable[Any] = shared_expert.linears()[:2]
        for linear, matrices in zip(linears, (2, 1), strict=True):
            linear.experts, linear.matrices, linear.has_others = (layer,), matrices, False


def _of_packed_experts(layer: Any) -> bool:
    """Whether a linear is of a shared expert that is packed with the routed ones."""
    return any(experts.packed for experts in getattr(layer, "experts", ()))


def leave_to_experts(shared_expert: MLP, as_loaded: Mapping[type, type[LeftAsLoaded]]) -> None:
    """Keep the weights of a shared expert as they are loaded, for the launches of the routed experts, which read them.

    Args:
        shared_expert: of linears of the engine.
        as_loaded: what takes the place of each of the engine's methods that would change them.
    """
    layers: Iterable[Any] = shared_expert.linears()
    for layer in layers:
        layer.packable = False
        if (ours := as_loaded.get(type(layer.quant_method))) is not None:
            layer.quant_method = ours(layer.quant_method.quant_config)


def prepare(layer: Any, packable: bool) -> None:
    """Have a linear's weight packed behind loading where ``packable``, on huge pages."""
    layer.packable, layer.packed = packable, False
    use_huge_pages(*packed_tensors(layer))


def replace_method(layer: Any, ours: Mapping[type, type[PackedLinear]], packable: bool) -> Any:
    """A layer of an engine with its method replaced by ours for it, where our kernel serves the layer's weight.

    Args:
        layer: a linear or a head of the engine.
        ours: our method for each of the engine's.
        packable: whether nothing but this layer reads its weight (a head may be tied to the embedding).
    """
    method = ours.get(type(layer.quant_method))
    if method is None:  # quantized; in four bits there is no parameter called weight
        return layer
    weight = layer.weight
    on_cpu = weight.device.type == "cpu"  # on a GPU the engine's own serve, whatever QNEXT_BACKEND forces on the others
    if on_cpu and OPERATIONS["linear"].select(weight.device, weight.dtype).name == "native":
        layer.quant_method = method()
        prepare(layer, packable)
    return layer


def linear_weight(layer: Any, ranks: int) -> LinearWeight | None:
    """What a linear of an engine multiplies with, one of so many ranks; None where that is not all that it does."""
    if not isinstance(getattr(layer, "quant_method", None), PackedLinear):
        return None
    if ranks > 1 and getattr(layer, "reduce_results", False):
        return None
    weight, *scale = _plain_tensors(layer, layer.quant_method)
    return LinearWeight(weight, layer.bias, layer.packed, *scale)


def experts_weights(layer: Any) -> ExpertsWeights | None:
    """Those of routed experts on our kernel, not quantized or, on a CPU, with scales; None of others."""
    method = layer.quant_method
    if isinstance(method, PackedExperts):
        return ExpertsWeights(layer.w13_weight, layer.w2_weight, layer.packed, method.shared(layer))
    if not isinstance(method, ScaledExperts):
        return None
    w13, w13_scale, w2, w2_scale = method.weights(layer)
    if isinstance(method, Fp8Experts) and _quantizes(w13.device, torch.get_default_dtype()):
        return None
    return ExpertsWeights(w13, w2, layer.packed, method.shared(layer), (w13_scale, w2_scale))


@contextmanager
def unpacked_weights(model: nn.Module) -> Iterator[None]:
    """A model whose weights can be loaded again inside a ``with`` block: they lie as the checkpoint has them.

    On a CPU they stay so until the engine processes them as after the first loading. On a GPU they are packed again at
    once, since a CUDA graph goes on reading them as they were when it was captured. vLLM's reload puts tensors without
    memory in their place before, processes each layer that it has filled, which is not loaded any more, and puts the
    old ones back where nothing came.
    """
    loaded = []
    _version.rise()
    filling = any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers()))
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if not isinstance(method, PackedLinear | PackedExperts | ScaledExperts):
            continue
        if layer.packed or _of_packed_experts(layer):
            layer.has_others = filling and next(layer.parameters()).is_meta  # type: ignore[assignment]
            if layer.packed and not filling:
                method.unpack(layer)
                loaded.append((method, layer))
                layer.packed = False  # type: ignore[assignment]
    yield
    for method, layer in loaded:
        if _graphs_read(layer):
            method.process_weights_after_loading(layer)


def _graphs_read(layer: Any) -> bool:
    return next(layer.parameters()).device.type != "cpu"
