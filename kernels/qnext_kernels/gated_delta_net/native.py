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
_NO_STEPS = (0,) * 11
"""Those from ``conv_steps`` to ``step_rows``."""


def reads(ba: Tensor, layer: tuple[Tensor, ...], conv_state: Tensor, state: Tensor, steps: Steps | None) -> bool:
    """Whether the kernel reads these tensors, as the operations by themselves would in C++."""
    if not all(tensor.dtype in DTYPES for tensor in (ba, conv_state, *layer)):
        return False
    return reads_pool(state) and (steps is None or reads_steps(steps[1]))


def run_native(
    qkvz: Tensor,
    ba: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    conv_state: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor | None = None,
    accepted: Tensor | None = None,
    steps: Steps | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Call ``qnext_gated_delta_net``: a verify given ``query_start_loc`` and ``accepted``, else a decode.

    Args:
        qkvz, ba, conv_weight, A_log, dt_bias, norm_weight, eps, conv_state, state, slots [N, columns], query_start_loc,
            accepted: of the public functions.
        steps: the step pools of the convolution and of the rule, and their rows.
        out: [T, HV · V], contiguous, where the result is written, if anywhere.

    Returns:
        [T, HV · V] in the dtype of ``qkvz``.
    """
    if qkvz.stride(2) != 1:
        qkvz = qkvz.contiguous()
    weights = conv_weight.contiguous(), A_log.contiguous(), dt_bias.contiguous(), norm_weight.contiguous()
    slots = slots.contiguous()
    sequences = _DECODE
    if query_start_loc is not None and accepted is not None:
        query_start_loc, accepted = query_start_loc.contiguous(), accepted.contiguous()
        sequences = *indices(query_start_loc), *indices(accepted)
    step_fields: tuple[int, ...] = _NO_STEPS
    if steps is not None:
        conv_pool, pool, step_rows = steps[0], steps[1], steps[2].contiguous()
        row, step, channel, column = conv_pool.stride()
        step_fields = conv_pool.data_ptr(), row, channel, column, step
        step_fields += pool.data_ptr(), DTYPES[pool.dtype], *pool.stride()[:2], *indices(step_rows)
    num_tokens, key_heads, _ = qkvz.shape
    _, value_heads, value_dim, key_dim = state.shape
    if out is None:
        out = torch.empty(num_tokens, value_heads * value_dim, dtype=qkvz.dtype)
    _kernel()(
        *(qkvz.data_ptr(), DTYPES[qkvz.dtype], *qkvz.stride()[:2], *floats(ba), *ba.stride()),
        *(field for weight in weights for field in floats(weight)),
        *(conv_state.data_ptr(), *conv_state.stride(), DTYPES[conv_state.dtype]),
        *(state.data_ptr(), DTYPES[state.dtype], state.stride(0)),
        *(*indices(slots), slots.shape[1]),
        *sequences,
        *step_fields,
        *(out.data_ptr(), num_tokens, slots.shape[0], key_heads, value_heads, key_dim, value_dim),
        *(conv_weight.shape[1], query_start_loc is not None, eps),
    )
    return out


_kernel = cache(lambda: packed_function("qnext_gated_delta_net", "52qd"))
