"""Gated RMSNorm, the output norm of Gated DeltaNet: x̂ · weight · SiLU(z), norm before gate.

Source: transformers' ``Qwen3NextRMSNormGated``; the norm is over the last axis (one value head), its weight is not
zero-centred.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext_kernels.checks import expect_destination, expect_floating, expect_shape
from qnext_kernels.dispatch import Operation
from qnext_kernels.gated_norm.cpu import CpuBackend
from qnext_kernels.gated_norm.native import GatedNormNative
from qnext_kernels.gated_norm.reference import ReferenceBackend
from qnext_kernels.gated_norm.triton import TritonGatedNorm
from qnext_kernels.layouts import once_per_layout

operation = Operation("gated_norm", [GatedNormNative(), CpuBackend(), TritonGatedNorm(), ReferenceBackend()])


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x / √(mean(x²) + eps) · weight · SiLU(z), computed in float32 and rounded once.

    Args:
        x, z: [..., V], any float dtype.
        weight: [V].
        eps: added to the mean square.
        out: [..., V] in the dtype of ``x``, contiguous, where the result is written; may be ``x``, but not overlap
            anything else.

    Returns:
        [..., V] in the dtype of ``x``; ``out`` where it is given.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
    """
    backend = _backend(x, z, weight)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        expect_destination("out", out, x.shape, x.dtype)
    backend.gated_rms_norm(x, z, weight, eps, out)
    return out


@once_per_layout
def _backend(x: Tensor, z: Tensor, weight: Tensor) -> Any:
    """Check the arguments; return the backend for them."""
    expect_floating("x", x)
    expect_shape("z", z, x.shape)
    expect_floating("z", z)
    expect_shape("weight", weight, (x.shape[-1],))
    expect_floating("weight", weight)
    return operation.select(x.device, x.dtype)
