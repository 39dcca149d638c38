"""Unquantized linears and heads of either engine on our kernel, which reads the weights as they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qnext_kernels import linear, selected_backends, use_huge_pages


class RowMajorMethod:
    """Goes before an engine's unquantized method: creating and loading the weights stays the engine's."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing: row-major weights are what the kernel reads; the engine's packed copy would be a second one."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.weight, bias)


def replace_method(layer: Any, ours: Mapping[type, type[RowMajorMethod]]) -> Any:
    """A layer of an engine with its method replaced by ours for it, where our kernel serves the layer's weight."""
    method = ours.get(type(layer.quant_method))
    if method is not None and selected_backends(layer.weight.device, layer.weight.dtype)["linear"] == "native":
        layer.quant_method = method()
        use_huge_pages(layer.weight)
    return layer
