"""What ``csrc/rows.h`` reads: tensors as rows of unit stride, and arguments packed as a C struct.

These kernels take about as long as it takes Python to call them, and filling a ctypes.Structure takes longer than that.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

from torch import Tensor

from qnext_kernels.native import DTYPES, library


def as_rows(x: Tensor) -> Tensor:
    """[..., D] with at most three dimensions and unit stride in D; a copy only where no view is such."""
    if x.dim() > 3:
        x = x.flatten(0, -3)
    return x if x.stride(-1) == 1 else x.contiguous()


def rows(x: Tensor) -> tuple[int, int, int, int]:
    """The four fields of ``Rows`` for what :func:`as_rows` returned."""
    outer_stride, inner_stride, _ = (0, 0, *x.stride())[-3:]
    return x.data_ptr(), DTYPES[x.dtype], outer_stride, inner_stride


def row_counts(x: Tensor) -> tuple[int, int, int]:
    """The sizes outer, inner and width."""
    outer, inner, width = (1, 1, *x.shape)[-3:]
    return outer, inner, width


def packed_function(name: str, layout: str) -> Callable[..., int | None]:
    """The C function ``bool name(const arguments*)``, called with the fields of its struct.

    Args:
        name: of the function.
        layout: the types of the fields, all of 8 bytes, as in :mod:`struct`.
    """
    function, pack = getattr(library(), name), struct.Struct(layout).pack
    function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_bool
    return lambda *fields: function(pack(*fields))
