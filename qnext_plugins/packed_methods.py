"""Unquantized linears, heads and experts of either engine on our kernels, with weights packed once behind loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qnext_kernels import (
    OPERATIONS,
    experts,
    experts_fp8,
    linear,
    pack_experts_,
    pack_weight_,
    unpack_experts_,
    unpack_weight_,
    use_huge_pages,
)


class PackedLinear:
    """Goes before an engine's unquantized method: creating and loading the weights stays the engine's."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.packed = layer.packable and pack_weight_(layer.weight.data)

    def unpack(self, layer: Any) -> None:
        unpack_weight_(layer.weight.data)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.weight, bias, layer.packed)


class PackedExperts:
    """Goes before an engine's unquantized method of routed experts, whose weights are laid out as the kernel's."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)  # type: ignore[misc]
        layer.packed = False
        use_huge_pages(layer.w13_weight, layer.w2_weight)

    def shared(self, layer: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """w13, w2 and gate of the shared expert that the kernel computes along, or None."""
        return None

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.packed = pack_experts_(*self._weights(layer))

    def unpack(self, layer: Any) -> None:
        unpack_experts_(*self._weights(layer))

    def _weights(self, layer: Any) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        shared = self.shared(layer)
        both = None if shared is None else (shared[0].data, shared[1].data)
        return layer.w13_weight.data, layer.w2_weight.data, both

    def run(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        weights = layer.w13_weight, layer.w2_weight
        return experts(x, *weights, topk_weights, topk_ids, layer.packed, self.shared(layer))


class Fp8Experts:
    """Goes before an engine's method of experts in block-wise FP8, which stay as the checkpoint has them."""

    def process_weights_after_loading(self, layer: Any) -> None:
        pass

    def run(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        up = layer.w13_weight, layer.w13_weight_scale_inv
        down = layer.w2_weight, layer.w2_weight_scale_inv
        return experts_fp8(x, *up, *down, topk_weights, topk_ids)


def replace_method(layer: Any, ours: Mapping[type, type[PackedLinear]], packable: bool) -> Any:
    """A layer of an engine with its method replaced by ours for it, where our kernel serves the layer's weight.

    Args:
        layer: a linear or a head of the engine.
        ours: our method for each of the engine's.
        packable: whether nothing but this layer reads its weight (a head may be tied to the embedding).
    """
    method = ours.get(type(layer.quant_method))
    weight = layer.weight
    on_cpu = weight.device.type == "cpu"  # on a GPU the engine's own serve, whatever QNEXT_BACKEND forces on the others
    if method is not None and on_cpu and OPERATIONS["linear"].select(weight.device, weight.dtype).name == "native":
        layer.quant_method = method()
        layer.packable, layer.packed = packable, False
        use_huge_pages(layer.weight)
    return layer


def unpack_weights(model: nn.Module) -> None:
    """Undo the packing of a model's weights, which may be loaded again then."""
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, PackedLinear | PackedExperts) and layer.packed:  # type: ignore[union-attr]
            method.unpack(layer)
            layer.packed = False  # type: ignore[assignment]
