"""What is found out once for all calls whose tensors have the same shapes, dtypes and devices.

On a GPU a call by itself looks at nothing else, for values cannot be read there; yet looking takes longer than many a
kernel.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
MOST_KNOWN = 1024
"""Layouts that a function remembers; then it begins anew."""

_memories: list[dict[Any, Any]] = []


def once_per_layout(function: FunctionT) -> FunctionT:
    """Decorate a function, to which a tensor comes first, so that it runs once for each layout of its arguments.

    Its result may follow from the shapes and dtypes of the tensors, from arguments that are no tensors, and from what
    :func:`forget` is called after changes of. Where the first tensor lies on a CPU, and under torch.compile, it runs at
    every call.

    Raises:
        ValueError: the first tensor lies on a GPU and another one does not lie there too; beside what it raises itself,
            which is not remembered.
    """
    names, known = tuple(inspect.signature(function).parameters), memory()

    @functools.wraps(function)
    def call(*arguments):  # type: ignore[no-untyped-def]
        if arguments[0].is_cpu or torch.compiler.is_compiling():
            return function(*arguments)
        layout = tuple([(x.shape, x.dtype, x.get_device()) if isinstance(x, Tensor) else x for x in arguments])
        try:
            return known[layout]
        except KeyError:
            pass
        _expect_one_device(names, arguments)
        result = function(*arguments)
        if len(known) >= MOST_KNOWN:
            known.clear()
        known[layout] = result
        return result

    return call  # type: ignore[return-value]


def memory() -> dict[Any, Any]:
    """A new dictionary, which :func:`forget` empties."""
    _memories.append({})
    return _memories[-1]


def forget() -> None:
    """Have everything found out again: what backends serve has changed."""
    for known in _memories:
        known.clear()


def _expect_one_device(names: tuple[str, ...], arguments: tuple[Any, ...]) -> None:
    device = arguments[0].device
    for name, argument in zip(names, arguments, strict=False):
        if isinstance(argument, Tensor) and argument.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {argument.device}")
