"""The recurrence in C++ (``csrc/gated_delta_rule.cpp``): one code for prefill, verify and decode."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qnext_kernels.dispatch import is_deterministic
from qnext_kernels.gated_delta_rule.cpu import CpuBackend
from qnext_kernels.native import DTYPES, NativeBackend
from qnext_kernels.rows import floats, indices, packed_function

_NONE = (0, 0)
"""Fields of ``Indices`` that are none."""
_NO_STEPS = (0,) * 6
"""The fields from ``steps`` to ``step_rows`` of ``DeltaRule`` in ``csrc/delta_net.h``."""
_DECODE = (*_NONE, *_NONE, 0, *_NONE, *_NONE, *_NO_STEPS)
"""Those from ``accepted`` to ``step_rows`` of one token a sequence."""


class GatedDeltaRuleNative(NativeBackend, CpuBackend):
    """Float32, but where there are BF16 dot products a prefill multiplies bfloat16 queries with the state by them.

    Keys and queries with each other too, which in float32 has the same products.

    A prefill runs in blocks of tokens, in the deterministic mode token by token: with a float32 pool every result then
    has the same bits however tokens are split between calls.

    What it does not read (a pool of another dtype, or not contiguous within a slot) runs in PyTorch.
    """

    name = "native"

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        slots: Tensor,
        query_start_loc: Tensor,
        has_initial: Tensor,
        snapshots: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if not (reads_pool(state) and _reads(a, b, A_log, dt_bias)):
            return super().prefill(q, k, v, a, b, A_log, dt_bias, state, slots, query_start_loc, has_initial, snapshots)
        has_initial, query_start_loc = has_initial.contiguous(), query_start_loc.contiguous()
        slot_fields = length_fields = _NONE
        if snapshots is not None:
            snapshots = snapshots[0].contiguous(), snapshots[1].contiguous()
            slot_fields, length_fields = indices(snapshots[0]), indices(snapshots[1])
        sequences = *_NONE, *indices(query_start_loc), has_initial.data_ptr(), *slot_fields, *length_fields
        tokens = q, k, v, a, b, A_log, dt_bias
        return _run(tokens, state, slots, (*sequences, *_NO_STEPS), recurrent=is_deterministic())

    def verify(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        slots: Tensor,
        query_start_loc: Tensor,
        accepted: Tensor,
        steps: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        pool, rows = steps if steps is not None else (None, None)
        if not (reads_pool(state) and _reads(a, b, A_log, dt_bias) and (pool is None or reads_steps(pool))):
            return super().verify(q, k, v, a, b, A_log, dt_bias, state, slots, query_start_loc, accepted, steps)
        accepted, query_start_loc = accepted.contiguous(), query_start_loc.contiguous()
        step_fields: tuple[int, ...] = _NO_STEPS
        if pool is not None and rows is not None:
            rows = rows.contiguous()
            step_fields = pool.data_ptr(), DTYPES[pool.dtype], *pool.stride()[:2], *indices(rows)
        sequences = *indices(accepted), *indices(query_start_loc), 0, *_NONE, *_NONE
        return _run((q, k, v, a, b, A_log, dt_bias), state, slots, (*sequences, *step_fields), every_token=True)

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        slots: Tensor,
    ) -> Tensor:
        if not (reads_pool(state) and _reads(a, b, A_log, dt_bias)):
            return super().decode(q, k, v, a, b, A_log, dt_bias, state, slots)
        return _run((q, k, v, a, b, A_log, dt_bias), state, slots, _DECODE)


def _reads(*tensors: Tensor) -> bool:
    return all(tensor.dtype in DTYPES for tensor in tensors)


def reads_pool(state: Tensor) -> bool:
    """Whether the kernel reads a pool [slots, HV, V, K] of this dtype and these strides."""
    _, value_dim, key_dim = state.shape[1:]
    return state.dtype in DTYPES and state.stride()[1:] == (value_dim * key_dim, key_dim, 1)


def reads_steps(pool: Tensor) -> bool:
    """The same of a step pool [rows, steps, HV, V, K]."""
    return reads_pool(pool[:, 0]) if pool.shape[1] else False


def _run(
    tokens: tuple[Tensor, ...],
    state: Tensor,
    slots: Tensor,
    sequences: tuple[int, ...],
    every_token: bool = False,
    recurrent: bool = False,
) -> Tensor:
    """Call with the fields of ``DeltaRule`` from ``accepted`` to ``step_rows``."""
    q, k, v, a, b = (x if x.stride()[-1] == 1 else x.contiguous() for x in tokens[:5])
    A_log, dt_bias = tokens[5].contiguous(), tokens[6].contiguous()
    slots = slots.contiguous()
    shape = v.shape
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    _kernel()(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), DTYPES[v.dtype]),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        *(*floats(a), *floats(b), a.stride()[0], b.stride()[0], *floats(A_log), *floats(dt_bias)),
        *(state.data_ptr(), DTYPES[state.dtype], state.stride()[0]),
        *(*indices(slots), slots.shape[1] if slots.dim() == 2 else 1),
        *sequences,
        *(slots.shape[0], q.shape[1], shape[1], q.shape[2], shape[2], every_token, recurrent),
    )
    return out


_kernel = cache(lambda: packed_function("qnext_gated_delta_rule", "49q"))
