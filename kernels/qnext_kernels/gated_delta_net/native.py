"""Decode and verify of all that lies between the projections in one call of C++ (``csrc/gated_delta_net.cpp``)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qnext_kernels.gated_delta_net.checks import Steps
from qnext_kernels.gated_delta_rule.native import reads_pool, reads_steps
from qnext_kernels.native import DTYPES
from qnext_kernels.rows import floats, indices, packed_function

_DECODE = (0, 0, 0, 0)
"""The fields ``query_start_loc`` and ``accepted`` of ``GatedDeltaNet`` in the C++ file."""
_NO_STEPS: tuple[int, ...] = (0,) * 11
"""Those from ``conv_steps`` to ``step_rows``."""


def reads(ba: Tensor, layer: tuple[Tensor, ...], conv_state: Tensor, state: Tensor, steps: Steps | None) -> bool:
    """Whether the kernel reads these tensors, as the operations by themselves would in C++."""
    if not all(tensor.dtype in DTYPES for tensor in (ba, conv_state, *layer)):
        return False
    return reads_pool(state) and (steps is None or reads_steps(steps[1]))


class NativeLayer:
    """What does not change between the calls of a layer, packed once.

    Args:
        conv_weight, A_log, dt_bias, norm_weight, eps, conv_state, state: of the public functions, checked there and
            allowed by ``reads``.
    """

    def __init__(
        self,
        conv_weight: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        norm_weight: Tensor,
        eps: float,
        conv_state: Tensor,
        state: Tensor,
    ) -> None:
        self.tensors = tuple(weight.contiguous() for weight in (conv_weight, A_log, dt_bias, norm_weight))
        self._eps = eps
        slots, value_heads, value_dim, key_dim = state.shape
        self._pools = (
            *(field for weight in self.tensors for field in floats(weight)),
            *(conv_state.data_ptr(), *conv_state.stride(), DTYPES[conv_state.dtype]),
            *(state.data_ptr(), DTYPES[state.dtype], state.stride(0)),
        )
        self._heads, self._slots = (value_heads, key_dim, value_dim), (slots, conv_state.shape[0])
        self._width, self._windows = conv_weight.shape[1], conv_state.shape[2] - conv_weight.shape[1] + 2

    def fields(
        self, dtype: torch.dtype, qkvz_head: int, ba_dtype: torch.dtype, ba_head: int, key_heads: int
    ) -> tuple[float, ...]:
        """Those of ``GatedDeltaNet`` without tokens and sequences, for projections that are contiguous."""
        value_heads, key_dim, value_dim = self._heads
        return (
            *(0, DTYPES[dtype], 0, qkvz_head, 0, DTYPES[ba_dtype], 0, ba_head, 1),
            *(*self._pools, 0, 0, 0, *_DECODE, *_NO_STEPS),
            *(0, 0, 0, key_heads, value_heads, key_dim, value_dim, self._width),
            *(False, *self._slots, 0, 0, 0, self._eps),
        )

    def run(
        self,
        qkvz: Tensor,
        qkvz_strides: tuple[int, int],
        ba: Tensor,
        ba_strides: tuple[int, int, int],
        key_heads: int,
        slots: Tensor,
        query_start_loc: Tensor | None,
        accepted: Tensor | None,
        steps: Steps | None,
        out: Tensor,
    ) -> bool:
        """Call ``qnext_gated_delta_net``: a verify given ``query_start_loc`` and ``accepted``, else a decode.

        Args:
            qkvz, qkvz_strides: of the public functions, unit stride along the last axis; between tokens and key heads.
            ba, ba_strides: of the public functions; between tokens, key heads and elements.
            key_heads: in ``qkvz``.
            slots: [N, columns].
            query_start_loc, accepted: of the public functions.
            steps: the step pools of the convolution and of the rule, and their rows.
            out: [T, HV · V], contiguous, written.

        Returns:
            False, having written nothing, where an index is out of range.
        """
        slots = slots.contiguous()
        count, columns = slots.shape
        sequences, most_tokens = _DECODE, min(columns, self._windows)
        most_accepted = most_tokens
        if query_start_loc is not None and accepted is not None:
            query_start_loc, accepted = query_start_loc.contiguous(), accepted.contiguous()
            sequences = *indices(query_start_loc), *indices(accepted)
        step_fields, rows = _NO_STEPS, 0
        if steps is not None:
            conv_pool, pool, step_rows = steps[0], steps[1], steps[2].contiguous()
            row, step, channel, column = conv_pool.stride()
            step_fields = conv_pool.data_ptr(), row, channel, column, step
            step_fields += pool.data_ptr(), DTYPES[pool.dtype], *pool.stride()[:2], *indices(step_rows)
            rows, most_tokens = min(conv_pool.shape[0], pool.shape[0]), conv_pool.shape[1]
        value_heads, key_dim, value_dim = self._heads
        return bool(
            _kernel()(
                *(qkvz.data_ptr(), DTYPES[qkvz.dtype], *qkvz_strides, *floats(ba), *ba_strides),
                *self._pools,
                *(*indices(slots), columns),
                *sequences,
                *step_fields,
                *(out.data_ptr(), qkvz.shape[0], count, key_heads, value_heads, key_dim, value_dim, self._width),
                *(query_start_loc is not None, *self._slots, rows, most_accepted, most_tokens, self._eps),
            )
        )


GATED_DELTA_NET = "57qd"
"""The struct's fields, as in :mod:`struct`."""
_kernel = cache(lambda: packed_function("qnext_gated_delta_net", GATED_DELTA_NET))
