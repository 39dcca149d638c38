"""The convolution in C++ (``csrc/causal_conv1d.cpp``): one code for prefill, verify and decode."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from qnext_kernels.causal_conv1d.cpu import CpuBackend
from qnext_kernels.native import DTYPES, Floats, Indices, NativeBackend, function


class _Pool(ctypes.Structure):
    """``ConvPool`` of the C++ file."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("slot", "channel", "column")))


class _Arguments(ctypes.Structure):
    """``CausalConv1d`` of the C++ file."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("x_token", ctypes.c_int64),
        ("weight", Floats),
        ("state", _Pool),
        ("state_dtype", ctypes.c_int64),
        ("slots", Indices),
        ("query_start_loc", Indices),
        ("has_initial", ctypes.c_void_p),
        ("snapshot_slots", Indices),
        ("snapshot_lengths", Indices),
        ("accepted", Indices),
        ("steps", _Pool),
        ("steps_step", ctypes.c_int64),
        ("step_rows", Indices),
        *((name, ctypes.c_int64) for name in ("tokens", "sequences", "channels", "width", "every_token")),
    )


@cache
def _kernel() -> Callable[[_Arguments], None]:
    return function("qnext_causal_conv1d", _Arguments)


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
    ) -> Tensor:
        if not _reads(weight, conv_state):
            return super().prefill(x, weight, conv_state, slots, query_start_loc, has_initial, snapshots)
        snapshot_slots, snapshot_lengths = (values.contiguous() for values in snapshots) if snapshots else (None, None)
        has_initial, query_start_loc = has_initial.contiguous(), query_start_loc.contiguous()
        return _run(
            x,
            weight,
            conv_state,
            slots,
            query_start_loc=Indices.of(query_start_loc),
            has_initial=has_initial.data_ptr(),
            snapshot_slots=Indices.of(snapshot_slots),
            snapshot_lengths=Indices.of(snapshot_lengths),
        )

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
        pool, rows = (steps[0], steps[1].contiguous()) if steps is not None else (None, None)
        return _run(
            x,
            weight,
            conv_state,
            slots,
            query_start_loc=Indices.of(query_start_loc),
            accepted=Indices.of(accepted),
            steps=_Pool() if pool is None else _Pool(pool.data_ptr(), pool.stride(0), pool.stride(2), pool.stride(3)),
            steps_step=0 if pool is None else pool.stride(1),
            step_rows=Indices.of(rows),
            every_token=1,
        )

    def decode(self, x: Tensor, weight: Tensor, conv_state: Tensor, slots: Tensor) -> Tensor:
        if not _reads(weight, conv_state):
            return super().decode(x, weight, conv_state, slots)
        return _run(x, weight, conv_state, slots)


def _reads(*tensors: Tensor) -> bool:
    return all(tensor.dtype in DTYPES for tensor in tensors)


def _run(x: Tensor, weight: Tensor, conv_state: Tensor, slots: Tensor, **options: object) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    weight, slots = weight.contiguous(), slots.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    _kernel()(
        _Arguments(
            x=x.data_ptr(),
            y=y.data_ptr(),
            dtype=DTYPES[x.dtype],
            x_token=x.stride(0),
            weight=Floats.of(weight),
            state=_Pool(conv_state.data_ptr(), *conv_state.stride()),
            state_dtype=DTYPES[conv_state.dtype],
            slots=Indices.of(slots),
            tokens=x.shape[0],
            sequences=slots.shape[0],
            channels=x.shape[1],
            width=weight.shape[1],
            **options,
        )
    )
    return y
