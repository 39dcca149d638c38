"""Linear layers in C++ (``csrc/linear.cpp``), over weights as the checkpoint stores them or packed."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from qnext_kernels.fp8 import FP8
from qnext_kernels.linear.cpu import CpuBackend
from qnext_kernels.native import DTYPES, NativeBackend
from qnext_kernels.operators import operator
from qnext_kernels.rows import address, packed_function

STORED = DTYPES | {FP8: len(DTYPES)}
"""How ``csrc/arguments.h`` numbers the dtypes of weights."""


class LinearNative(NativeBackend, CpuBackend):
    """Every product accumulates in float32 in one order: a row's bits do not depend on how many rows there are."""

    name = "native"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias, False, None)

    def linear_fp8(self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
        return linear(x, weight, bias, False, scale)

    def linear_packed(self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        return linear(x, weight, bias, True, scale)

    def pack_weight_(self, weight: Tensor, back: bool) -> None:
        rows, k = weight.shape[-2:]
        matrices = weight.numel() // (rows * k) if rows * k else 0
        _pack()(weight.data_ptr(), STORED[weight.dtype], matrices, rows, k, back)


def packable(weight: Tensor) -> bool:
    """Whether a weight [..., N, K] can be packed in place: in memory, contiguous, and K whole steps."""
    step = 1 if weight.element_size() == 4 else 2
    return not weight.is_meta and weight.is_contiguous() and weight.shape[-1] % step == 0


def _empty(x: Tensor, weight: Tensor, bias: Tensor | None, packed: bool, scale: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@operator(_empty)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: bool, scale: Tensor | None) -> Tensor:
    out = _empty(x, weight, bias, packed, scale)
    x, weight = x if x.stride()[1] == 1 else x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    scale = None if scale is None else scale.contiguous()
    tokens = (x.shape[0], DTYPES[x.dtype], out.data_ptr(), x.data_ptr(), x.stride()[0])
    _kernel()(*linear_fields(weight, bias, packed, scale, *tokens))
    return out


def linear_fields(
    weight: Tensor,
    bias: Tensor | None,
    packed: bool,
    scale: Tensor | None,
    tokens: int,
    dtype: int,
    out: int = 0,
    x: int = 0,
    x_token: int = 0,
) -> tuple[int, ...]:
    """The fields of ``Linear``; what it reads or writes is the neighbouring operation's where it is 0.

    Args:
        dtype: of the tokens, as in ``DTYPES``.
        out, x, x_token: addresses, and the stride between tokens.
    """
    places = (x, weight.data_ptr(), address(bias), address(scale), out)
    return *places, dtype, x_token, tokens, *weight.shape, packed


_kernel = cache(lambda: packed_function("qnext_linear", "11q"))
_pack = cache(lambda: packed_function("qnext_pack", "6q"))
