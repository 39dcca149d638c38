"""The convolution in C++ (``csrc/causal_conv1d.cpp``): one code for prefill, verify and decode."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qnext_kernels.causal_conv1d.cpu import CpuBackend
from qnext_kernels.native import DTYPES, NativeBackend
from qnext_kernels.rows import floats, indices, packed_function

_NONE = (0, 0)
"""Fields of ``Indices`` that are none."""
_NO_STEPS = (0,) * 7
"""The fields from ``steps`` to ``step_rows`` of ``CausalConv1d`` in ``csrc/delta_net.h``."""
_NOT_GROUPED = (0, 0, 0)
"""Those from ``key_heads`` on."""


class CausalConv1dNative(NativeBackend, CpuBackend):
    """Float32 sums; pools of any strides. A weight or pool of another dtype is left to PyTorch."""

    name = "native"

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
        if not _reads(weight, conv_state):
            return super().prefill(x, weight, conv_state, slots, query_start_loc, has_initial, snapshots, key_dim)
        has_initial, query_start_loc = has_initial.contiguous(), query_start_loc.contiguous()
        slot_fields = length_fields = _NONE
        if snapshots is not None:
            snapshots = snapshots[0].contiguous(), snapshots[1].contiguous()
            slot_fields, length_fields = indices(snapshots[0]), indices(snapshots[1])
        sequences = *indices(query_start_loc), has_initial.data_ptr(), *slot_fields, *length_fields
        return _run(x, weight, conv_state, slots, (*sequences, *_NONE, *_NO_STEPS), key_dim=key_dim)

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
        if not _reads(weight, conv_state):
            return super().verify(x, weight, conv_state, slots, query_start_loc, accepted, steps)
        query_start_loc, accepted = query_start_loc.contiguous(), accepted.contiguous()
        step_fields: tuple[int, ...] = _NO_STEPS
        if steps is not None:
            pool, rows = steps[0], steps[1].contiguous()
            row, step, channel, column = pool.stride()
            step_fields = pool.data_ptr(), row, channel, column, step, *indices(rows)
        sequences = *indices(query_start_loc), 0, *_NONE, *_NONE, *indices(accepted)
        return _run(x, weight, conv_state, slots, (*sequences, *step_fields), every_token=True)

    def decode(self, x: Tensor, weight: Tensor, conv_state: Tensor, slots: Tensor) -> Tensor:
        if not _reads(weight, conv_state):
            return super().decode(x, weight, conv_state, slots)
        return _run(x, weight, conv_state, slots, _DECODE)


_DECODE = (*_NONE, 0, *_NONE, *_NONE, *_NONE, *_NO_STEPS)


def _reads(*tensors: Tensor) -> bool:
    return all(tensor.dtype in DTYPES for tensor in tensors)


def _run(
    x: Tensor,
    weight: Tensor,
    conv_state: Tensor,
    slots: Tensor,
    sequences: tuple[int, ...],
    every_token: bool = False,
    key_dim: int | None = None,
) -> Tensor:
    """Call with the fields of ``CausalConv1d`` from ``query_start_loc`` to ``step_rows``."""
    if x.stride()[-1] != 1:
        x = x.contiguous()
    weight = weight.contiguous()
    tokens, (channels, width) = x.shape[0], weight.shape
    y = torch.empty((tokens, channels), dtype=x.dtype)
    _kernel()(
        *(x.data_ptr(), y.data_ptr(), DTYPES[x.dtype], x.stride()[0]),
        *floats(weight),
        *(conv_state.data_ptr(), *conv_state.stride(), DTYPES[conv_state.dtype]),
        *(*indices(slots), slots.stride(0)),
        *sequences,
        *(tokens, slots.shape[0], channels, width, every_token),
        *(_NOT_GROUPED if key_dim is None else (x.shape[1], key_dim, x.stride()[1])),
    )
    return y


_kernel = cache(lambda: packed_function("qnext_causal_conv1d", "38q"))
