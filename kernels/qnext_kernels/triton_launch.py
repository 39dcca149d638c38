"""Launches of kernels of Triton without its own look-up of what it has compiled.

That takes Triton longer, of some twenty arguments, than the GPU computes in a step of decode: it looks at every
argument, and at every option by its name. Here what is compiled is found by the values themselves, and is launched as
Triton launches it.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext_kernels.triton_support import ALIGNMENT

MOST_REMEMBERED = 1024
"""Cases of a kernel; then it begins anew."""
_MISALIGNED = ALIGNMENT - 1
_dtype = attrgetter("dtype")


class _Launches(NamedTuple):
    """Those of a kernel."""

    kernel: Any
    """Kept, so that no other one gets its identity."""
    tensors: int
    """How many of the arguments are tensors."""
    tiles: int
    """How many behind them are tensor descriptors, or None."""
    known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]]
    """By case: what launches the compiled kernel, and the constants among its parameters."""


_launches: dict[int, _Launches] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)``, the tensors on the current device.

    The first launch of a kernel, and the first of a case, go through Triton. So does every one on AMD's GPUs, where
    what is compiled also depends on the size of the memory that a tensor is part of, and wherever Triton gives back
    nothing that it has compiled, as its interpreter does.

    Args:
        kernel: made by ``triton.jit``.
        grid: programs.
        arguments: tensors; tensor descriptors of some of them, in tiles that follow from the constants, or None; and
            numbers: for the first parameters of the kernel.
        constants: for the other parameters of the kernel, and options of Triton.
    """
    own = _launches.get(id(kernel))
    if own is None:
        if kernel[grid](*arguments, **constants) is not None and torch.version.hip is None:
            _launches[id(kernel)] = _Launches(kernel, *_counts(arguments), {})
        return
    tensors = arguments[: own.tensors]
    addresses = [*map(Tensor.data_ptr, tensors)]
    # What Triton compiles follows from less; of that, these have few values in a process.
    case = (
        grid,
        tensors[0].get_device(),
        arguments[own.tensors + own.tiles :],
        *map(_dtype, tensors),
        *[address & _MISALIGNED for address in addresses],
        *constants,
        *constants.values(),
    )
    found = own.known.get(case)
    if found is not None:
        run, parameters = found
        run(*addresses, *arguments[own.tensors :], *parameters)
        return
    compiled = kernel[grid](*arguments, **constants)
    if compiled is None:
        return
    if len(own.known) >= MOST_REMEMBERED:
        own.known.clear()
    own.known[case] = compiled[(*grid, 1, 1)[:3]], tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def _counts(arguments: tuple[Any, ...]) -> tuple[int, int]:
    """How many of the arguments are tensors, which come first, and how many are no numbers either, which come next."""
    tensors = sum(isinstance(argument, Tensor) for argument in arguments)
    numbers = sum(isinstance(argument, (int, float)) for argument in arguments)
    tiles = len(arguments) - tensors - numbers
    assert all(isinstance(argument, Tensor) for argument in arguments[:tensors])
    assert all(isinstance(argument, (int, float)) for argument in arguments[tensors + tiles :])
    return tensors, tiles
