"""The gated RMSNorm in C++ (``csrc/norms.cpp``)."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from qnext_kernels.gated_norm.cpu import CpuBackend
from qnext_kernels.native import DTYPES, NativeBackend
from qnext_kernels.operators import operator
from qnext_kernels.rows import floats, packed_function, row_counts, rows


class GatedNormNative(NativeBackend, CpuBackend):
    """Float32, one row at a time."""

    name = "native"

    def gated_rms_norm(self, x: Tensor, z: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        if z.dtype not in DTYPES or weight.dtype not in DTYPES:
            super().gated_rms_norm(x, z, weight, eps, out)
        else:
            gated_rms_norm(x, z, weight, eps, out)


@operator(lambda x, z, weight, eps, out: None, mutates=["out"])
def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    (x, x_rows), (z, z_rows), weight = rows(x), rows(z), weight.contiguous()
    _kernel()(*x_rows, *z_rows, *floats(weight), out.data_ptr(), *row_counts(x), eps)


_kernel = cache(lambda: packed_function("qnext_gated_rms_norm", "14qd"))
