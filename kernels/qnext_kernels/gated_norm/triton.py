"""The gated RMSNorm in Triton, one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.operators import operator
from qnext_kernels.triton_support import TritonBackend


class TritonGatedNorm(TritonBackend):
    """Float32; a row is summed in an order that follows from its width and dtype."""

    batch_invariant = True

    def gated_rms_norm(self, x: Tensor, z: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        triton_gated_rms_norm(x, z, weight, eps, out)


@operator(lambda x, z, weight, eps, out: None, mutates=["out"])
def triton_gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """:func:`qnext_kernels.gated_rms_norm`."""
    from qnext_kernels.gated_norm.triton_norm import run_gated_rms_norm

    with torch.cuda.device_of(x):
        run_gated_rms_norm(x, z, weight, eps, out)
