"""Which backend serves a call, and why not the others.

A backend is a small class with :meth:`Backend.supports` and :meth:`Backend.supports_call`, which return ``None`` or the
reason it declines. An operation lists its backends fastest first; the first one that supports the call serves it,
unless the table of measured backends (:mod:`qnext_kernels.backend_table`) names another for this GPU and shape.
``QNEXT_BACKEND`` forces a choice, for every operation (``QNEXT_BACKEND=reference``) or for one
(``QNEXT_BACKEND=cpu,gated_delta_rule=reference``). A forced backend that cannot serve is an error that carries its
reason.

In the deterministic mode (``QNEXT_DETERMINISTIC=1``) only backends that are :attr:`Backend.batch_invariant` serve.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch

from qnext_kernels import backend_table, layouts

BACKEND_NAMES = ("reference", "cpu", "native", "triton", "triton_context_parallel", "flashinfer", "flash_qla")
OPERATION_NAMES = (
    "causal_conv1d",
    "gated_attention",
    "gated_delta_rule",
    "gated_norm",
    "linear",
    "moe",
    "paged_attention",
    "rms_norm",
)


class BackendError(RuntimeError):
    """A forced backend does not exist or cannot serve the call."""


class Call(NamedTuple):
    """What an operation knows of a call before a backend is picked: sizes, dtypes and which arguments there are.

    Operations make none on a CPU, where backends serve every call and a step of decode has no time to spare.
    """

    method: str
    """Of the backend, which is about to be called."""
    tokens: int
    """Of the batch; in a prefill of the delta rule those of a sequence, on average."""
    shape: tuple[int, ...]
    """Sizes that all calls of one layer share, as the operation lists them."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Of further tensors, as the operation lists them."""
    features: tuple[str, ...] = ()
    """What the call asks for beyond the ordinary, in the operation's words."""


class Backend:
    """One implementation of one operation."""

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...] | None] = None
    """Device types it runs on; None for all."""
    batch_invariant: ClassVar[bool] = False
    """Whether a token's bits depend on nothing but its own sequence: not on what else is in the batch, nor on how the
    sequence is split between calls (with states in float32), nor on the number of threads."""

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return None if it can serve tensors of this device and activation dtype, else the reason why not."""
        if not dtype.is_floating_point:
            return f"needs a floating-point dtype, got {dtype}"
        if self.devices is not None and device.type not in self.devices:
            return f"runs on {'/'.join(self.devices)}, not on {device.type}"
        return None

    def supports_call(self, device: torch.device, dtype: torch.dtype, call: Call) -> str | None:
        """Return None if it can serve such a call, on a device and dtype that it supports, else the reason why not."""
        return None


class Operation:
    """An operation and its backends, fastest first."""

    def __init__(self, name: str, backends: Sequence[Backend]) -> None:
        assert name in OPERATION_NAMES
        self.name = name
        self.backends = tuple(backends)
        self._serving = layouts.memory()
        self._led_by = {
            first.name: (first, *(backend for backend in backends if backend is not first)) for first in backends
        }
        OPERATIONS[name] = self

    def select(self, device: torch.device, dtype: torch.dtype, call: Call | None = None) -> Any:
        """Return the backend that serves tensors of this device and dtype; its methods are those of the reference.

        Args:
            device, dtype: of the activations.
            call: what is known of the call; None asks only about device and dtype.

        Raises:
            BackendError: a forced backend is missing or declines, or none supports the call.
        """
        forced = _forced.get(self.name, _forced.get("*"))
        if forced is not None or call is not None or torch.compiler.is_compiling():
            return self._choose(device, dtype, call, forced)
        # Asking every backend anew would cost a step of decode more than it computes in some operations.
        case = device, dtype
        if case not in self._serving:
            self._serving[case] = self._choose(device, dtype, None, None)
        return self._serving[case]

    def _choose(self, device: torch.device, dtype: torch.dtype, call: Call | None, forced: str | None) -> Backend:
        reasons = ""
        for backend in self.backends if forced is not None or call is None else self._in_order(device, dtype, call):
            if forced is not None and backend.name != forced:
                continue
            reason = reason_to_decline(backend, device, dtype, call)
            if reason is None:
                return backend
            reasons += f"; {backend.name}: {reason}"
        if forced is not None and not reasons:
            have = ", ".join(backend.name for backend in self.backends)
            raise BackendError(f"{self.name} has no backend {forced!r} (it has {have}); see QNEXT_BACKEND")
        method = "" if call is None else f".{call.method}"
        raise BackendError(f"no backend serves {self.name}{method} on {device} with {dtype}{reasons}")

    def _in_order(self, device: torch.device, dtype: torch.dtype, call: Call) -> Sequence[Backend]:
        """The backends, first the one that the table names. A graph of torch.compile is for any number of tokens."""
        if device.type != "cuda" or torch.compiler.is_compiling() or not (measured := measured_backends()).lines:
            return self.backends
        key = self.name, call.method, dtype, call.shape
        first = measured.fastest(backend_table.device_names(device.index), key, call.tokens)
        return self._led_by.get(first or "", self.backends)


@cache
def measured_backends() -> backend_table.Table:
    """The table of measured backends; raises TableError where its file is broken."""
    return backend_table.read(backend_table.PATH, OPERATION_NAMES, BACKEND_NAMES)


OPERATIONS: dict[str, Operation] = {}


def reason_to_decline(
    backend: Backend, device: torch.device, dtype: torch.dtype, call: Call | None = None
) -> str | None:
    """Return None if ``backend`` may serve such tensors, or such a call, in the present mode, else why not."""
    if _deterministic and not backend.batch_invariant:
        return "is not batch invariant, as the deterministic mode requires"
    reason = backend.supports(device, dtype)
    return reason if reason is not None or call is None else backend.supports_call(device, dtype, call)


def switched_on(variable: str, *, default: bool) -> bool:
    """Whether an environment variable is on; one that is empty is as if it were not set."""
    value = os.environ.get(variable) or str(default)
    return value.lower() not in ("0", "false", "f", "no", "n", "off")


_deterministic = switched_on("QNEXT_DETERMINISTIC", default=False)


def is_deterministic() -> bool:
    """Whether the deterministic mode is on: only batch-invariant backends serve."""
    return _deterministic


def set_deterministic(on: bool) -> None:
    """Turn the deterministic mode on or off for this process; at first it is as ``QNEXT_DETERMINISTIC`` says."""
    global _deterministic
    _deterministic = on
    layouts.forget()


@contextlib.contextmanager
def deterministic(on: bool = True) -> Iterator[None]:
    """The deterministic mode, on or off, inside a ``with`` block."""
    previous = is_deterministic()
    set_deterministic(on)
    try:
        yield
    finally:
        set_deterministic(previous)


def refuse_if_deterministic(operation: str, what: str) -> None:
    """Raise BackendError in the deterministic mode, where ``what`` is about to run and is not batch invariant.

    For what a batch-invariant backend leaves to PyTorch, call by call.
    """
    if _deterministic:
        raise BackendError(f"{operation}: {what} is not batch invariant, as the deterministic mode requires")


def parse_forced(value: str) -> dict[str, str]:
    """Parse the value of ``QNEXT_BACKEND`` into {operation or "*": backend name}.

    Raises:
        BackendError: a name in it is no backend or no operation.
    """
    forced: dict[str, str] = {}
    for part in filter(None, (item.strip() for item in value.split(","))):
        operation, _, backend = (word.strip() for word in part.rpartition("="))
        if backend not in BACKEND_NAMES:
            raise BackendError(f"QNEXT_BACKEND: expected one of {', '.join(BACKEND_NAMES)}, got {backend!r}")
        if operation and operation not in OPERATION_NAMES:
            raise BackendError(
                f"QNEXT_BACKEND: expected an operation ({', '.join(OPERATION_NAMES)}), got {operation!r}"
            )
        forced[operation or "*"] = backend
    return forced


_forced = parse_forced(os.environ.get("QNEXT_BACKEND", ""))


@contextlib.contextmanager
def force_backend(value: str) -> Iterator[None]:
    """Force backends inside a ``with`` block; ``value`` is written as for ``QNEXT_BACKEND``."""
    previous = dict(_forced)
    _forced.update(parse_forced(value))
    layouts.forget()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(previous)
        layouts.forget()


def selected_backends(device: torch.device, dtype: torch.dtype, but: Collection[str] = ()) -> dict[str, str]:
    """For every operation, ``but`` some, the name of the backend that serves such tensors.

    Raises:
        BackendError: as :meth:`Operation.select` does.
    """
    return {name: operation.select(device, dtype).name for name, operation in OPERATIONS.items() if name not in but}


def without_kernels(device_type: str) -> list[str]:
    """The operations that nothing but the reference serves on devices of a type; touches no device."""
    return [
        name
        for name, operation in OPERATIONS.items()
        if not any(device_type in backend.devices for backend in operation.backends if backend.devices is not None)
    ]


def explain(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, str | None]]:
    """For every operation, each backend's reason to decline such tensors (None: it supports them), fastest first."""
    return {
        name: {backend.name: reason_to_decline(backend, device, dtype) for backend in operation.backends}
        for name, operation in OPERATIONS.items()
    }
