"""Zero-centred RMSNorm with an optional residual: x̂ · (1 + weight).

Source: transformers' ``Qwen3NextRMSNorm``; the residual sum is that of the decoder layer in front of the norm.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qnext_kernels.checks import expect_dtype, expect_floating, expect_shape
from qnext_kernels.dispatch import Call, Operation
from qnext_kernels.layouts import once_per_layout
from qnext_kernels.rms_norm.cpu import CpuBackend
from qnext_kernels.rms_norm.flashinfer import FlashInferRmsNorm
from qnext_kernels.rms_norm.native import RmsNormNative
from qnext_kernels.rms_norm.reference import ReferenceBackend
from qnext_kernels.rms_norm.triton import TritonRmsNorm

operation = Operation(
    "rms_norm", [RmsNormNative(), CpuBackend(), TritonRmsNorm(), FlashInferRmsNorm(), ReferenceBackend()]
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """r = x + residual (rounded to the dtype of ``x``), then r / √(mean(r²) + eps) · (1 + weight) in float32.

    Args:
        x: [..., D], any float dtype.
        weight: [D], zero-centred.
        eps: added to the mean square.
        residual: [..., D] in the dtype of ``x``, or None for zero.

    Returns:
        The normalised tensor and r (``x`` itself without a residual), both [..., D] in the dtype of ``x``.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
    """
    result: tuple[Tensor, Tensor] = _backend(x, weight, residual).rms_norm(x, weight, eps, residual)
    return result


@once_per_layout
def _backend(x: Tensor, weight: Tensor, residual: Tensor | None) -> Any:
    """Check the arguments; return the backend for them."""
    expect_floating("x", x)
    expect_shape("weight", weight, (x.shape[-1],))
    expect_floating("weight", weight)
    if residual is not None:
        expect_shape("residual", residual, x.shape)
        expect_dtype("residual", residual, (x.dtype,))
    return operation.select(x.device, x.dtype, _call(x, weight))


def _call(x: Tensor, weight: Tensor) -> Call | None:
    """Shape: D; dtypes: that of the weight."""
    if x.is_cpu:
        return None
    width = x.shape[-1]
    return Call("rms_norm", x.numel() // max(width, 1), (width,), (weight.dtype,))
