"""Linear layers, x · weightᵀ + bias (PyTorch's ``F.linear``), over unquantized weights in the checkpoint's layout."""

from __future__ import annotations

from torch import Tensor

from qnext_kernels.checks import expect_dtype, expect_floating, expect_shape
from qnext_kernels.dispatch import Operation
from qnext_kernels.linear.cpu import CpuBackend
from qnext_kernels.linear.native import LinearNative
from qnext_kernels.linear.reference import ReferenceBackend

operation = Operation("linear", [LinearNative(), CpuBackend(), ReferenceBackend()])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply tokens with the rows of a weight, accumulating in float32 (float64 for float64).

    Args:
        x: [T, K], any float dtype.
        weight: [N, K] in the dtype of ``x``.
        bias: [N] in the dtype of ``x``, or None.

    Returns:
        [T, N] in the dtype of ``x``, rounded once.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    expect_shape("x", x, (None, None))
    expect_floating("x", x)
    expect_shape("weight", weight, (None, x.shape[1]))
    expect_dtype("weight", weight, (x.dtype,))
    if bias is not None:
        expect_shape("bias", bias, (weight.shape[0],))
        expect_dtype("bias", bias, (x.dtype,))
    return operation.select(x.device, x.dtype).linear(x, weight, bias)
