"""Linear layers, x · weightᵀ + bias (PyTorch's ``F.linear``), over weights as they are or in block-wise FP8.

A weight lies as in the checkpoint, or packed in place by :func:`pack_weight_`: 64 rows side by side, which a kernel
reads as one stream. The bits of a result do not depend on which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext_kernels.checks import expect_dtype, expect_floating, expect_shape
from qnext_kernels.dispatch import BackendError, Operation
from qnext_kernels.fp8 import FP8, expect_scale
from qnext_kernels.linear.cpu import CpuBackend
from qnext_kernels.linear.native import LinearNative, packable
from qnext_kernels.linear.reference import ReferenceBackend

operation = Operation("linear", [LinearNative(), CpuBackend(), ReferenceBackend()])


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: bool = False, scale: Tensor | None = None
) -> Tensor:
    """Multiply tokens with the rows of a weight, accumulating in float32 (float64 for float64).

    Args:
        x: [T, K], any float dtype. It is never quantized.
        weight: [N, K] in the dtype of ``x``, or float8_e4m3fn.
        bias: [N] in the dtype of ``x``, or None.
        packed: whether :func:`pack_weight_` has packed the weight.
        scale: [ceil(N / 128), ceil(K / 128)] float32 of a weight in float8_e4m3fn, ``weight_scale_inv`` of a
            checkpoint: what a block of 128 rows and 128 columns is multiplied with; else None.

    Returns:
        [T, N] in the dtype of ``x``, rounded once.

    Raises:
        ValueError, TypeError: an argument does not fit.
        BackendError: the backend that serves does not read packed weights.
    """
    expect_shape("x", x, (None, None))
    expect_floating("x", x)
    expect_shape("weight", weight, (None, x.shape[1]))
    expect_dtype("weight", weight, (x.dtype if scale is None else FP8,))
    if scale is not None:
        expect_scale("scale", scale, weight)
    if bias is not None:
        expect_shape("bias", bias, (weight.shape[0],))
        expect_dtype("bias", bias, (x.dtype,))
    backend = operation.select(x.device, x.dtype)
    if packed:
        expect_reads_packed(backend)
        return backend.linear_packed(x, weight, bias, scale)
    return backend.linear(x, weight, bias) if scale is None else backend.linear_fp8(x, weight, bias, scale)


def pack_weight_(weight: Tensor) -> bool:
    """Pack the matrices of a weight in place, where the backend that serves them reads packed ones.

    A whole panel of 64 rows [64, K] becomes [K / s, 64, s], with s elements in 32 bits, or in FP8 two, in an order of
    the processor's; rows behind the last whole panel of a matrix stay.

    Args:
        weight: [..., N, K], any float dtype, or float8_e4m3fn; written in place.

    Returns:
        Whether it is packed now: not where the backend does not read it so, where it is not contiguous, or where K is
        odd and the dtype has 16 bits or fewer.
    """
    expect_floating("weight", weight)
    backend = _backend_of(weight)
    if backend.name != LinearNative.name or not packable(weight):
        return False
    backend.pack_weight_(weight, back=False)
    return True


def unpack_weight_(weight: Tensor) -> None:
    """Undo :func:`pack_weight_` in place; raises BackendError where the backend does not read packed weights."""
    backend = _backend_of(weight)
    expect_reads_packed(backend)
    backend.pack_weight_(weight, back=True)


def _backend_of(weight: Tensor) -> Any:
    """That of activations in the dtype of the weight; a weight in FP8 lies alike for any."""
    return operation.select(weight.device, torch.bfloat16 if weight.dtype == FP8 else weight.dtype)


def expect_reads_packed(backend: Any) -> None:
    """Raise BackendError unless a backend reads packed weights."""
    if backend.name != LinearNative.name:
        raise BackendError(f"packed: backend {backend.name} reads weights as the checkpoint stores them")
