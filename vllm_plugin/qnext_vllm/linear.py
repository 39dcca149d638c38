"""vLLM's unquantized linears and heads on our kernel."""

from __future__ import annotations

from typing import Any

from qnext_plugins.linear_method import RowMajorMethod, replace_method
from qnext_vllm import vllm_api as api


class QnextLinearMethod(RowMajorMethod, api.UnquantizedLinearMethod):
    pass


class QnextHeadMethod(RowMajorMethod, api.UnquantizedEmbeddingMethod):
    pass


OURS = {api.UnquantizedLinearMethod: QnextLinearMethod, api.UnquantizedEmbeddingMethod: QnextHeadMethod}


def on_our_kernel(layer: Any) -> Any:
    """``layer`` with our method, where our kernel for linears serves its weight and it is not quantized."""
    return replace_method(layer, OURS)
