"""The zero-centred RMSNorm in C++ (``csrc/norms.cpp``)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qnext_kernels.native import DTYPES, NativeBackend
from qnext_kernels.operators import operator
from qnext_kernels.rms_norm.cpu import CpuBackend
from qnext_kernels.rows import floats, packed_function, row_counts, rows


class RmsNormNative(NativeBackend, CpuBackend):
    """Float32, one row at a time."""

    name = "native"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if weight.dtype not in DTYPES:
            return super().rms_norm(x, weight, eps, residual)
        if residual is None:
            return rms_norm(x, weight, eps), x
        return add_rms_norm(x, residual, weight, eps)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator(lambda x, weight, eps: _empty(x))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = _empty(x)
    _run(x, _NO_ROWS, weight, out, 0, eps)
    return out


@operator(lambda x, residual, weight, eps: (_empty(x), _empty(x)))
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, total = _empty(x), _empty(x)
    residual, residual_rows = rows(residual)
    _run(x, residual_rows, weight, out, total.data_ptr(), eps)
    return out, total


def _run(x: Tensor, residual: tuple[int, ...], weight: Tensor, out: Tensor, total: int, eps: float) -> None:
    x, x_rows = rows(x)
    weight = weight.contiguous()
    _kernel()(*x_rows, *residual, *floats(weight), out.data_ptr(), total, *row_counts(x), eps)


_NO_ROWS = (0, 0, 0, 0)
_kernel = cache(lambda: packed_function("qnext_rms_norm", "15qd"))
