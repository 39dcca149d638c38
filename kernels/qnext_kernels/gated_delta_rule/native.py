"""The recurrence in C++ (``csrc/gated_delta_rule.cpp``): one code for prefill, verify and decode."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from qnext_kernels.gated_delta_rule.cpu import CpuBackend
from qnext_kernels.native import DTYPES, Floats, Indices, NativeBackend, function, pointer


class _Arguments(ctypes.Structure):
    """``DeltaRule`` of the C++ file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "q_token", "q_head", "k_token", "k_head", "v_token", "v_head")),
        ("a", Floats),
        ("b", Floats),
        ("a_token", ctypes.c_int64),
        ("b_token", ctypes.c_int64),
        ("A_log", Floats),
        ("dt_bias", Floats),
        ("state", ctypes.c_void_p),
        ("state_dtype", ctypes.c_int64),
        ("state_slot", ctypes.c_int64),
        ("slots", Indices),
        ("slot_columns", ctypes.c_int64),
        ("accepted", Indices),
        ("query_start_loc", Indices),
        ("has_initial", ctypes.c_void_p),
        ("snapshot_slots", Indices),
        ("snapshot_lengths", Indices),
        ("steps", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("steps_dtype", "steps_row", "steps_step")),
        ("step_rows", Indices),
        *((name, ctypes.c_int64) for name in ("sequences", "key_heads", "value_heads", "key_dim", "value_dim")),
        ("every_token", ctypes.c_int64),
        ("recurrent", ctypes.c_int64),
    )


@cache
def _kernel() -> Callable[[_Arguments], None]:
    return function("qnext_gated_delta_rule", _Arguments)


class GatedDeltaRuleNative(NativeBackend, CpuBackend):
    """Float32 throughout; every result has the same bits however tokens are split between calls.

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
        if not (_reads_pool(state) and _reads(a, b, A_log, dt_bias)):
            return super().prefill(q, k, v, a, b, A_log, dt_bias, state, slots, query_start_loc, has_initial, snapshots)
        snapshot_slots, snapshot_lengths = (x.contiguous() for x in snapshots) if snapshots else (None, None)
        has_initial, query_start_loc = has_initial.contiguous(), query_start_loc.contiguous()
        return _run(
            (q, k, v, a, b, A_log, dt_bias),
            state,
            slots,
            query_start_loc=Indices.of(query_start_loc),
            has_initial=has_initial.data_ptr(),
            snapshot_slots=Indices.of(snapshot_slots),
            snapshot_lengths=Indices.of(snapshot_lengths),
        )

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
        if not (_reads_pool(state) and _reads(a, b, A_log, dt_bias) and (pool is None or _reads_steps(pool))):
            return super().verify(q, k, v, a, b, A_log, dt_bias, state, slots, query_start_loc, accepted, steps)
        accepted, query_start_loc = accepted.contiguous(), query_start_loc.contiguous()
        rows = None if rows is None else rows.contiguous()
        return _run(
            (q, k, v, a, b, A_log, dt_bias),
            state,
            slots,
            accepted=Indices.of(accepted),
            query_start_loc=Indices.of(query_start_loc),
            steps=pointer(pool),
            steps_dtype=0 if pool is None else DTYPES[pool.dtype],
            steps_row=0 if pool is None else pool.stride(0),
            steps_step=0 if pool is None else pool.stride(1),
            step_rows=Indices.of(rows),
            every_token=1,
        )

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
        if not (_reads_pool(state) and _reads(a, b, A_log, dt_bias)):
            return super().decode(q, k, v, a, b, A_log, dt_bias, state, slots)
        return _run((q, k, v, a, b, A_log, dt_bias), state, slots)


def _reads(*tensors: Tensor) -> bool:
    return all(tensor.dtype in DTYPES for tensor in tensors)


def _reads_pool(state: Tensor) -> bool:
    _, value_dim, key_dim = state.shape[1:]
    return state.dtype in DTYPES and state.stride()[1:] == (value_dim * key_dim, key_dim, 1)


def _reads_steps(pool: Tensor) -> bool:
    return _reads_pool(pool[:, 0]) if pool.shape[1] else False


def _run(tokens: tuple[Tensor, ...], state: Tensor, slots: Tensor, **options: object) -> Tensor:
    q, k, v, a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in tokens[:5])
    A_log, dt_bias = (x.contiguous() for x in tokens[5:])
    slots = slots.contiguous()
    num_tokens, value_heads, value_dim = v.shape
    out = torch.empty((num_tokens, value_heads, value_dim), dtype=v.dtype)
    _kernel()(
        _Arguments(
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            out=out.data_ptr(),
            dtype=DTYPES[v.dtype],
            q_token=q.stride(0),
            q_head=q.stride(1),
            k_token=k.stride(0),
            k_head=k.stride(1),
            v_token=v.stride(0),
            v_head=v.stride(1),
            a=Floats.of(a),
            b=Floats.of(b),
            a_token=a.stride(0),
            b_token=b.stride(0),
            A_log=Floats.of(A_log),
            dt_bias=Floats.of(dt_bias),
            state=state.data_ptr(),
            state_dtype=DTYPES[state.dtype],
            state_slot=state.stride(0),
            slots=Indices.of(slots),
            slot_columns=slots.shape[1] if slots.dim() == 2 else 1,
            sequences=slots.shape[0],
            key_heads=q.shape[1],
            value_heads=value_heads,
            key_dim=q.shape[2],
            value_dim=value_dim,
            **options,
        )
    )
    return out
