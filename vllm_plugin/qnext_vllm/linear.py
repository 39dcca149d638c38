"""vLLM's unquantized linears and heads on our kernel."""

from __future__ import annotations

from typing import Any

from qnext_plugins.packed_methods import PackedLinear, replace_method
from qnext_vllm import vllm_api as api


class QnextLinearMethod(PackedLinear, api.UnquantizedLinearMethod):
    pass


class QnextHeadMethod(PackedLinear, api.UnquantizedEmbeddingMethod):
    pass


OURS = {api.UnquantizedLinearMethod: QnextLinearMethod, api.UnquantizedEmbeddingMethod: QnextHeadMethod}


def on_our_kernel(layer: Any, packable: bool = True) -> Any:
    """``layer`` with our method, where our kernel for linears serves its weight and it is not quantized.

    ``packable``: nothing but this layer reads its weight.
    """
    return replace_method(layer, OURS, packable)
