"""vLLM's unquantized linears and heads on our kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qnext_kernels import linear
from qnext_plugins.packed_methods import PackedLinear, replace_method
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
