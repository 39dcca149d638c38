"""Linear layers in C++ (``csrc/linear.cpp``), over weights as the checkpoint stores them or packed."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from qnext_kernels.linear.cpu import CpuBackend
from qnext_kernels.native import DTYPES, NativeBackend
from qnext_kernels.operators import operator
from qnext_kernels.rows import floats, packed_function


class LinearNative(NativeBackend, CpuBackend):
    """Every product accumulates in float32 in one order: a row's bits do not depend on how many rows there are."""

    name = "native"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias, False)

    def linear_packed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias, True)

    def pack_weight_(self, weight: Tensor, back: bool) -> None:
        rows, k = weight.shape[-2:]
        _pack()(*floats(weight), weight.numel() // (rows * k) if rows * k else 0, rows, k, back)


def packable(weight: Tensor) -> bool:
    """Whether a weight [..., N, K] can be packed in place: contiguous, and K whole steps of 32 bits."""
    return weight.is_contiguous() and weight.shape[-1] * weight.element_size() % 4 == 0


def _empty(x: Tensor, weight: Tensor, bias: Tensor | None, packed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@operator(_empty)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: bool) -> Tensor:
    out = _empty(x, weight, bias, packed)
    x, weight = x if x.stride()[1] == 1 else x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    places = (x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr())
    _kernel()(*places, DTYPES[x.dtype], x.stride()[0], x.shape[0], *weight.shape, packed)
    return out


_kernel = cache(lambda: packed_function("qnext_linear", "10q"))
_pack = cache(lambda: packed_function("qnext_pack", "6q"))
