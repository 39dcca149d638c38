"""SGLang's unquantized linears and heads on our kernel."""

from __future__ import annotations

from typing import Any

from qnext_plugins.packed_methods import PackedLinear, replace_method
from qnext_sglang import sglang_api as api


class QnextLinearMethod(PackedLinear, api.UnquantizedLinearMethod):
    pass


class QnextHeadMethod(PackedLinear, api.UnquantizedEmbeddingMethod):
    """SGLang multiplies with the weight itself unless the class has a name that it does not know."""


OURS = {api.UnquantizedLinearMethod: QnextLinearMethod, api.UnquantizedEmbeddingMethod: QnextHeadMethod}


def on_our_kernel(layer: Any, packable: bool = True) -> Any:
    """``layer`` with our method, where our kernel for linears serves its weight and it is not quantized.

    ``packable``: nothing but this layer reads its weight.
    """
    return replace_method(layer, OURS, packable)
