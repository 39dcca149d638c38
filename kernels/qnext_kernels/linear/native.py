"""Linear layers in C++ (``csrc/linear.cpp``), over weights as the checkpoint stores them or packed."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qnext_kernels.fp8 import FP8
from qnext_kernels.integers import GROUPED, columns_of, group_of
from qnext_kernels.linear.cpu import CpuBackend
from qnext_kernels.native import DTYPES, NativeBackend
from qnext_kernels.operators import operator
from qnext_kernels.rows import address, packed_function

STORED = {dtype: number for number, dtype in enumerate((*DTYPES, FP8, *GROUPED))}
"""How ``csrc/arguments.h`` numbers the dtypes of weights."""
PANEL = 64
"""Rows that a packed weight has side by side (``kPanel``)."""


class LinearNative(NativeBackend, CpuBackend):
    """Every product accumulates in float32 in one order: a row's bits do not depend on how many rows there are."""

    name = "native"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias, False, None)

    def linear_scaled(self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
        return linear(x, weight, bias, False, scale)

    def linear_packed(self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        return linear(x, weight, bias, True, scale)

    def pack_weight_(self, weight: Tensor, scale: Tensor | None, back: bool) -> None:
        rows, k = weight.shape[-2], columns_of(weight)
        matrices = weight.numel() // (rows * weight.shape[-1]) if rows * k else 0
        _pack()(weight.data_ptr(), STORED[weight.dtype], matrices, rows, k, back)
        if scale is not None:
            panels = scale[..., : rows // PANEL * PANEL, :].unflatten(-2, (-1, PANEL))
            shape = (*panels.shape[:-2], *reversed(panels.shape[-2:])) if back else panels.shape
            panels.copy_(panels.reshape(shape).mT.clone(memory_format=torch.contiguous_format).view(panels.shape))


def packable(weight: Tensor, scale: Tensor | None = None) -> bool:
    """Whether a weight [..., N, K] can be packed in place: in memory, contiguous, and K whole steps."""
    step = 1 if weight.element_size() == 4 else 2
    stored = (weight,) if scale is None else (weight, scale)
    return all(not x.is_meta and x.is_contiguous() for x in stored) and weight.shape[-1] % step == 0


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
    sizes = (weight.shape[0], columns_of(weight), group_of(weight, scale))
    return *places, dtype, STORED[weight.dtype], x_token, tokens, *sizes, packed


_kernel = cache(lambda: packed_function("qnext_linear", "13q"))
_pack = cache(lambda: packed_function("qnext_pack", "6q"))
