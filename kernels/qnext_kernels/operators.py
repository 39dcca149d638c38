"""``torch.ops.qnext``: what a graph of torch.compile holds where the code behind cannot be traced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

FunctionT = TypeVar("FunctionT", bound=Callable[..., object])

_library = torch.library.Library("qnext", "FRAGMENT")


def operator(
    fake: Callable[..., object], *, mutates: Iterable[str] = (), name: str | None = None
) -> Callable[[FunctionT], FunctionT]:
    """Decorate a function: torch.compile sees ``torch.ops.qnext.<name>``, eager mode calls the function itself.

    The function's annotations give the operator's schema; no result may share memory with an argument.

    Args:
        fake: takes the same arguments and returns empty tensors with the shapes, strides and dtypes of the results.
        mutates: names of the arguments that are written in place.
        name: the function's own where it is not given.
    """

    def decorate(function: FunctionT) -> FunctionT:
        op_name = name or function.__name__
        _library.define(torch.library.infer_schema(function, op_name=op_name, mutates_args=mutates))
        _library.impl(op_name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qnext::{op_name}", fake, lib=_library)
        traced = getattr(torch.ops.qnext, op_name).default

        @functools.wraps(function)
        def call(*args):  # type: ignore[no-untyped-def]
            # The dispatcher would cost more than many a kernel.
            return traced(*args) if torch.compiler.is_compiling() else function(*args)

        return call  # type: ignore[return-value]

    return decorate
