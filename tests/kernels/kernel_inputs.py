"""What the kernel tests share: pools of slots, ragged offsets, and comparisons whose tolerance follows from dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("cpu", "reference")
NATIVE_BACKENDS = ("native", *BACKENDS)
"""Of the operations that are written in C++ too."""
LENGTHS = (0, 1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129)
"""Sequence lengths around every boundary of a prefill: nothing, the token-by-token runs, and chunks of 64."""


def assert_close(actual: Tensor, truth: Tensor, roundings: Mapping[torch.dtype, int]) -> None:
    """Compare a result with one of higher precision.

    Args:
        actual: the result.
        truth: the same values without rounding errors.
        roundings: how often, in each dtype, something that enters one element of the result has been rounded: the
            length of the reduction times the roundings of a term.
    """
    # A rounding errs by at most eps/2 of a value that is of the order of the largest result. Independent roundings add
    # up as a random walk, so n of them err by about eps/2 · √n; 8 times that leaves room for terms that are larger than
    # their sum and for the tail of the distribution. The result itself is rounded once more, relative to its own size.
    actual, truth = actual.detach(), truth.detach()
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    walk = sum(torch.finfo(dtype).eps * math.sqrt(count) for dtype, count in roundings.items())
    rtol = torch.finfo(actual.dtype).eps / 2
    torch.testing.assert_close(actual.double(), truth.double(), atol=4 * walk * scale, rtol=rtol)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """torch.equal, but NaN equals itself and 0 differs from −0."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    return torch.equal(bits(a.contiguous()), bits(b.contiguous()))


def bits(x: Tensor) -> Tensor:
    """The same memory as integers of the same size."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def nan_pool(slots: int, shape: Sequence[int], dtype: torch.dtype, *, gap: int = 3) -> Tensor:
    """A pool [slots, *shape] of NaN in which ``gap`` elements lie between one slot and the next."""
    size = math.prod(shape)
    return torch.full((slots, size + gap), math.nan, dtype=dtype)[:, :size].unflatten(1, tuple(shape))


def nan_steps(rows: int, steps: int, shape: Sequence[int], dtype: torch.dtype, *, steps_first: bool) -> Tensor:
    """A step pool [rows, steps, *shape] of NaN, by rows or by steps in memory, with gaps in between."""
    if steps_first:
        return nan_pool(steps, (rows, *shape), dtype).transpose(0, 1)
    return nan_pool(rows, (steps, *shape), dtype)


def memory(pool: Tensor) -> Tensor:
    """All bytes of a pool, those between its slots among them; shares its storage."""
    return torch.empty(0, dtype=torch.uint8).set_(pool.untyped_storage())


def only_written(pool: Tensor, before: Tensor, bytes_before: Tensor, written: Tensor) -> bool:
    """Whether nothing but the slots ``written`` [M] has changed; puts those back to ``before``."""
    # As integers: on a GPU, PyTorch does not keep the bits of every NaN that it copies.
    bits(pool)[written] = bits(before)[written]
    return torch.equal(memory(pool), bytes_before)


def start_offsets(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """query_start_loc [N + 1] of sequences of these lengths."""
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)


def distinct_slots(count: int, slots: int) -> Tensor:
    """[count] int32, different from each other, in random order."""
    return torch.randperm(slots)[:count].int()


class Bad(NamedTuple):
    """One argument made wrong, and the exception whose message must begin with its name."""

    argument: str
    how: str
    change: Callable[[Any], Any]
    error: type[Exception]

    def __str__(self) -> str:
        return f"{self.argument}: {self.how}"
