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
    """Whether a weight [..., N, K] can be packed in place: in memory, contiguous, and K whole steps of 32 bits."""
    return not weight.is_meta and weight.is_contiguous() and weight.shape[-1] * weight.element_size() % 4 == 0


def _empty(x: Tensor, weight: Tensor, bias: Tensor | None, packed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@operator(_empty)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: bool) -> Tensor:
    out = _empty(x, weight, bias, packed)
    x, weight = x if x.stride()[1] == 1 else x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    _kernel()(*linear_fields(weight, bias, packed, x.shape[0], out.data_ptr(), x.data_ptr(), x.stride()[0]))
    return out


def linear_fields(
    weight: Tensor, bias: Tensor | None, packed: bool, tokens: int, out: int = 0, x: int = 0, x_token: int = 0
) -> tuple[int, ...]:
    """The fields of ``Linear``; what it reads or writes is the neighbouring operation's where it is 0."""
    places = (x, weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out)
    return *places, DTYPES[weight.dtype], x_token, tokens, *weight.shape, packed


_kernel = cache(lambda: packed_function("qnext_linear", "10q"))
_pack = cache(lambda: packed_function("qnext_pack", "6q"))
