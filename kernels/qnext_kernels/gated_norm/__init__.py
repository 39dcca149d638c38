"""Gated RMSNorm, the output norm of Gated DeltaNet: x̂ · weight · SiLU(z), norm before gate.

Source: transformers' ``Qwen3NextRMSNormGated``; the norm is over the last axis (one value head), its weight is not
zero-centred.
"""

from __future__ import annotations

from torch import Tensor

from qnext_kernels.checks import expect_floating, expect_shape
from qnext_kernels.dispatch import Operation
from qnext_kernels.gated_norm.cpu import CpuBackend
from qnext_kernels.gated_norm.native import GatedNormNative
from qnext_kernels.gated_norm.reference import ReferenceBackend
from qnext_kernels.gated_norm.triton import TritonGatedNorm

operation = Operation("gated_norm", [GatedNormNative(), CpuBackend(), TritonGatedNorm(), ReferenceBackend()])


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight · SiLU(z), computed in float32 and rounded once.

    Args:
        x, z: [..., V], any float dtype.
        weight: [V].
        eps: added to the mean square.

    Returns:
        [..., V] in the dtype of ``x``.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
    """
    expect_floating("x", x)
    expect_shape("z", z, x.shape)
    expect_floating("z", z)
    expect_shape("weight", weight, (x.shape[-1],))
    expect_floating("weight", weight)
    return operation.select(x.device, x.dtype).gated_rms_norm(x, z, weight, eps)
