"""Launches of kernels of Triton without its own look-up of what it has compiled.

That takes Triton longer, of some twenty arguments, than the GPU computes in a step of decode: it looks at every
argument, and at every option by its name. Here what is compiled is found by the values themselves, and is launched as
Triton launches it.
"""

from __future__ import annotations

import inspect
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor

from qnext_kernels.triton_support import ALIGNMENT

MOST_COMPILED = 1024
"""Launches of a kernel that are remembered; then it begins anew."""
_MISALIGNED = ALIGNMENT - 1
_dtype = attrgetter("dtype")


class _Launches(NamedTuple):
    """Of one kernel, by what it has been launched with: what launches it, and the constants among its parameters."""

    kernel: Any
    tensors: int
    """How many of the arguments are tensors."""
    tiles: int
    """How many behind them are tensor descriptors, or None."""
    known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]]


_launches: dict[int, _Launches] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)``, the tensors on the current device.

    Args:
        kernel: made by ``triton.jit``; or by the interpreter, for every launch of which this is no more than that.
        grid: programs.
        arguments: tensors; tensor descriptors of some of them, in tiles that follow from the constants, or None; and
            numbers: for the first parameters of the kernel.
        constants: for the other parameters of the kernel, and options of Triton.
    """
    own = _launches.get(id(kernel)) or _first_launch(kernel, arguments)
    behind = own.tensors + own.tiles
    tensors, numbers = arguments[: own.tensors], arguments[behind:]
    addresses = [*map(Tensor.data_ptr, tensors)]
    # What Triton compiles follows from less; of that, these have few values in a process.
    case = (
        grid,
        tensors[0].get_device(),
        numbers,
        *map(_dtype, tensors),
        *[address & _MISALIGNED for address in addresses],
        *constants,
        *constants.values(),
    )
    if (found := own.known.get(case)) is not None:
        run, parameters = found
        run(*addresses, *arguments[own.tensors :], *parameters)
        return
    compiled = kernel[grid](*arguments, **constants)
    if compiled is not None:
        names = [*inspect.signature(kernel.fn).parameters][len(arguments) :]
        if len(own.known) >= MOST_COMPILED:
            own.known.clear()
        own.known[case] = compiled[(*grid, 1, 1)[:3]], tuple(constants[name] for name in names)


def _first_launch(kernel: Any, arguments: tuple[Any, ...]) -> _Launches:
    tensors = sum(isinstance(argument, Tensor) for argument in arguments)
    numbers = sum(isinstance(argument, (int, float)) for argument in arguments)
    tiles = len(arguments) - tensors - numbers
    assert all(isinstance(argument, Tensor) for argument in arguments[:tensors])
    assert all(isinstance(argument, (int, float)) for argument in arguments[tensors + tiles :])
    # The kernel is kept, so that no other one gets its identity.
    return _launches.setdefault(id(kernel), _Launches(kernel, tensors, tiles, {}))
