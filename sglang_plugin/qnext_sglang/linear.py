"""SGLang's linears and heads on our kernel: unquantized ones, and on a CPU those in block-wise FP8 or in int4."""

from __future__ import annotations

from typing import Any

from qnext_plugins.packed_methods import Fp8Linear, Int4Linear, Int8Linear, PackedLinear, prepare, replace_method
from qnext_sglang import quantization
from qnext_sglang import sglang_api as api


class QnextLinearMethod(PackedLinear, api.UnquantizedLinearMethod):
    pass


class _TakenOver(api.LinearMethodBase):
    """Its weights and scales are those that SGLang's method has created and SGLang loads.

    Args:
        quant_config: SGLang's, which its loading asks a method for.
    """

    def __init__(self, quant_config: Any) -> None:
        self.quant_config = quant_config

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("SGLang's method has created the weights")


class QnextFp8LinearMethod(Fp8Linear, _TakenOver):
    pass


class QnextInt4LinearMethod(Int4Linear, _TakenOver):
    pass


class QnextInt8LinearMethod(Int8Linear, _TakenOver):
    pass


class QnextHeadMethod(PackedLinear, api.UnquantizedEmbeddingMethod):
    """SGLang multiplies with the weight itself unless the class has a name that it does not know."""


OURS = {api.UnquantizedLinearMethod: QnextLinearMethod, api.UnquantizedEmbeddingMethod: QnextHeadMethod}
SCALED = {api.Fp8LinearMethod: QnextFp8LinearMethod}
INTEGERS = {4: QnextInt4LinearMethod, 8: QnextInt8LinearMethod}
"""By the bits of a weight."""


def on_our_kernel(layer: Any, packable: bool = True) -> Any:
    """``layer`` with our method, where our kernel for linears serves its weight.

    ``packable``: nothing but this layer reads its weight.
    """
    theirs = layer.quant_method
    scheme: Any = getattr(layer, "scheme", None)
    integers = isinstance(scheme, quantization.IntegerScheme)
    ours = INTEGERS[scheme.bits] if integers else SCALED.get(type(theirs))
    if ours is not None and quantization.ours_on_cpu(theirs.quant_config):
        layer.quant_method = ours(theirs.quant_config)
        prepare(layer, packable)
        return layer
    return replace_method(layer, OURS, packable)
