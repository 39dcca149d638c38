"""The convolution in Triton, one launch a call."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.triton_support import TritonBackend


class TritonCausalConv1d(TritonBackend):
    """Float32 sums; pools of any strides, written where they lie.

    Nothing is read on the host and every grid follows from shapes, so that a CUDA graph can capture each call. Outputs
    of tokens that belong to no sequence are undefined.
    """

    batch_invariant = True

    def prefill(
        self,
        x: Tensor,
        weight: Tensor,
        conv_state: Tensor,
        slots: Tensor,
        query_start_loc: Tensor,
        has_initial: Tensor,
        snapshots: tuple[Tensor, Tensor] | None = None,
        key_dim: int | None = None,
    ) -> Tensor:
        from qnext_kernels.causal_conv1d.triton_conv import run_prefill

        y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
        with torch.cuda.device_of(x):
            run_prefill(x, weight, y, conv_state, slots, query_start_loc, has_initial, snapshots, key_dim)
        return y

    def verify(
        self,
        x: Tensor,
        weight: Tensor,
        conv_state: Tensor,
        slots: Tensor,
        query_start_loc: Tensor,
        accepted: Tensor,
        steps: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        from qnext_kernels.causal_conv1d.triton_conv import run_verify

        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        with torch.cuda.device_of(x):
            run_verify(x, weight, y, conv_state, slots, query_start_loc, accepted, steps)
        return y

    def decode(self, x: Tensor, weight: Tensor, conv_state: Tensor, slots: Tensor) -> Tensor:
        from qnext_kernels.causal_conv1d.triton_conv import run_verify

        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        with torch.cuda.device_of(x):
            run_verify(x, weight, y, conv_state, slots)
        return y
