"""Linear layers, x · weightᵀ + bias (PyTorch's ``F.linear``), also over weights in FP8, int4 or int8 with scales.

A weight lies as in the checkpoint, or packed in place by :func:`pack_weight_`: 64 rows side by side, which a kernel
reads as one stream. The bits of a result do not depend on which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext_kernels.checks import expect_dtype, expect_floating, expect_shape
from qnext_kernels.dispatch import BackendError, Operation
from qnext_kernels.integers import GROUPED
from qnext_kernels.linear.cpu import CpuBackend
from qnext_kernels.linear.native import LinearNative, packable
from qnext_kernels.linear.reference import ReferenceBackend
from qnext_kernels.quantized import SCALED, expect_scale, stored_columns

operation = Operation("linear", [LinearNative(), CpuBackend(), ReferenceBackend()])


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: bool = False, scale: Tensor | None = None
) -> Tensor:
    """Multiply tokens with the rows of a weight, accumulating in float32 (float64 for float64).

    Args:
        x: [T, K], any float dtype. It is never quantized.
        weight: [N, K] in the dtype of ``x``, or float8_e4m3fn; in int8 [N, K] uint8, as itself + 128; or in int4
            [N, K / 8] int32, eight columns in a number, the first in its lowest bits, as themselves + 8.
        bias: [N] in the dtype of ``x``, or None.
        packed: whether :func:`pack_weight_` has packed the weight.
        scale: [ceil(N / 128), ceil(K / 128)] float32 of a weight in float8_e4m3fn, ``weight_scale_inv`` of a
            checkpoint: what a block of 128 rows and 128 columns is multiplied with; in int4 and int8 [N, K / group] in
            the dtype of ``x``, what 32, 64 or 128 columns of a row are multiplied with; else None.

    Returns:
        [T, N] in the dtype of ``x``, rounded once.

    Raises:
        ValueError, TypeError: an argument does not fit.
        BackendError: the backend that serves does not read packed weights.
    """
    expect_shape("x", x, (None, None))
    expect_floating("x", x)
    expect_dtype("weight", weight, (x.dtype,) if scale is None else SCALED)
    expect_shape("weight", weight, (None, stored_columns("x", x.shape[1], weight.dtype)))
    if scale is not None:
        expect_scale("scale", scale, weight, x.dtype)
    if bias is not None:
        expect_shape("bias", bias, (weight.shape[0],))
        expect_dtype("bias", bias, (x.dtype,))
    backend = operation.select(x.device, x.dtype)
    if packed:
        expect_reads_packed(backend)
        return backend.linear_packed(x, weight, bias, scale)
    return backend.linear(x, weight, bias) if scale is None else backend.linear_scaled(x, weight, bias, scale)


def pack_weight_(weight: Tensor, scale: Tensor | None = None) -> bool:
    """Pack the matrices of a weight in place, where the backend that serves them reads packed ones.

    A whole panel of 64 rows [64, K] becomes [K / s, 64, s], with s elements in 32 bits, or with scales two, in an order
    of the processor's; rows behind the last whole panel of a matrix stay.

    Args:
        weight: [..., N, K], any float dtype, or float8_e4m3fn, or in int8 uint8; or in int4 [..., N, K / 8] int32;
            written in place.
        scale: of a weight in int4 or int8 [..., N, K / group], written in place: that of a panel becomes
            [K / group, 64].

    Returns:
        Whether it is packed now: not where the backend does not read it so, where it is not contiguous, or where K is
        odd and the dtype has 16 bits or fewer.
    """
    expect_scale_of_groups(weight, scale)
    backend = _backend_of(weight)
    if backend.name != LinearNative.name or not packable(weight, scale):
        return False
    backend.pack_weight_(weight, scale, back=False)
    return True


def unpack_weight_(weight: Tensor, scale: Tensor | None = None) -> None:
    """Undo :func:`pack_weight_` in place; raises BackendError where the backend does not read packed weights."""
    expect_scale_of_groups(weight, scale)
    backend = _backend_of(weight)
    expect_reads_packed(backend)
    backend.pack_weight_(weight, scale, back=True)


def _backend_of(weight: Tensor) -> Any:
    """That of activations in the dtype of the weight; one with scales lies alike for any."""
    return operation.select(weight.device, torch.bfloat16 if weight.dtype in SCALED else weight.dtype)


def expect_scale_of_groups(weight: Tensor, scale: Tensor | None) -> None:
    """Raise unless a weight to be packed or unpacked has its scale with it in int4 or int8, and no other has one."""
    grouped = weight.dtype in GROUPED
    if not grouped:
        expect_floating("weight", weight)
    if grouped != (scale is not None):
        expected = "that of a weight in int4 or int8" if grouped else "None unless the weight is in int4 or int8"
        raise ValueError(f"scale: expected {expected}, got {None if scale is None else list(scale.shape)}")
    if scale is not None:
        expect_floating("scale", scale)
        expect_scale("scale", scale, weight, scale.dtype)


def expect_reads_packed(backend: Any) -> None:
    """Raise BackendError unless a backend reads packed weights."""
    if backend.name != LinearNative.name:
        raise BackendError(f"packed: backend {backend.name} reads weights as the checkpoint stores them")
