"""The zero-centred RMSNorm in Triton, one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.operators import operator
from qnext_kernels.triton_support import TritonBackend


class TritonRmsNorm(TritonBackend):
    """Float32; a row is summed in an order that follows from its width and dtype."""

    batch_invariant = True

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return triton_rms_norm(x, weight, eps), x
        return triton_add_rms_norm(x, residual, weight, eps)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator(lambda x, weight, eps: _empty(x))
def triton_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """:func:`qnext_kernels.rms_norm` without a residual."""
    from qnext_kernels.rms_norm.triton_norm import run_rms_norm

    out = _empty(x)
    with torch.cuda.device_of(x):
        run_rms_norm(x, None, weight, eps, out, out)
    return out


@operator(lambda x, residual, weight, eps: (_empty(x), _empty(x)))
def triton_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`qnext_kernels.rms_norm` with a residual."""
    from qnext_kernels.rms_norm.triton_norm import run_rms_norm

    out, total = _empty(x), _empty(x)
    with torch.cuda.device_of(x):
        run_rms_norm(x, residual, weight, eps, out, total)
    return out, total
