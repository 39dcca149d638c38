"""What ``csrc/rows.h`` reads: tensors as rows of unit stride, and arguments packed as a C struct.

Of one token, most of the time is that of the call, and struct packs arguments in a third of the time of ctypes.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from qnext_kernels.native import DTYPES, library


def floats(x: Tensor) -> tuple[int, int]:
    """The fields of ``Floats``, or of a pointer and its dtype, for a contiguous tensor."""
    return x.data_ptr(), DTYPES[x.dtype]


def address(x: Tensor | None) -> int:
    """Where a tensor lies, or 0."""
    return 0 if x is None else x.data_ptr()


def indices(x: Tensor | None) -> tuple[int, int]:
    """The fields of ``Indices`` for a contiguous int32 or int64 tensor, or none."""
    return (0, 0) if x is None else (x.data_ptr(), x.dtype == torch.int64)


def rows(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """[..., D] as rows: the tensor that holds them, copied only where no view does, and the four fields of ``Rows``."""
    if x.dim() > 3:
        x = x.flatten(0, -3)
    strides = x.stride()
    if strides[-1] != 1:
        x = x.contiguous()
        strides = x.stride()
    outer, inner = strides[:2] if len(strides) == 3 else (0, strides[0])
    return x, (x.data_ptr(), DTYPES[x.dtype], outer, inner)


def row_counts(x: Tensor) -> tuple[int, int, int]:
    """The sizes outer, inner and width of what :func:`rows` returned."""
    shape = x.shape
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    outer, inner, width = (1, 1, *shape)[-3:]
    return outer, inner, width


def packed_function(name: str, layout: str) -> Callable[..., int | None]:
    """The C function ``name(const arguments*)``, void or bool, called with the fields of its struct.

    Args:
        name: of the function.
        layout: the types of the fields, all of 8 bytes, as in :mod:`struct`.
    """
    function, pack = getattr(library(), name), struct.Struct(layout).pack
    function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_bool
    return lambda *fields: function(pack(*fields))
