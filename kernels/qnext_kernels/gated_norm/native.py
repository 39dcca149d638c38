"""The gated RMSNorm in C++ (``csrc/norms.cpp``)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qnext_kernels.gated_norm.cpu import CpuBackend
from qnext_kernels.native import DTYPES, NativeBackend
from qnext_kernels.operators import operator
from qnext_kernels.rows import floats, packed_function, row_counts, rows


class GatedNormNative(NativeBackend, CpuBackend):
    """Float32, one row at a time."""

    name = "native"

    def gated_rms_norm(self, x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        if z.dtype not in DTYPES or weight.dtype not in DTYPES:
            return super().gated_rms_norm(x, z, weight, eps)
        return gated_rms_norm(x, z, weight, eps)


@operator(lambda x, z, weight, eps: torch.empty_like(x, memory_format=torch.contiguous_format))
def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (x, x_rows), (z, z_rows), weight = rows(x), rows(z), weight.contiguous()
    _kernel()(*x_rows, *z_rows, *floats(weight), out.data_ptr(), *row_counts(x), eps)
    return out


_kernel = cache(lambda: packed_function("qnext_gated_rms_norm", "14qd"))
