"""Argument checks shared by the operations: every failure names the argument, what was expected and what came.

Values (slot indices, offsets) are read only where the tensors lie on a CPU: on a GPU that would synchronise, and the
kernels themselves skip slot −1 and clamp. Under torch.compile they are not read either.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)
FEW = 64
"""So many indices are read faster by Python than by an operator of PyTorch: those of a step of decode."""


def expect_shape(name: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Raise ValueError unless ``tensor`` has ``shape`` (None: any size)."""
    sizes = tensor.shape
    if sizes == shape:
        return
    if len(sizes) == len(shape):
        for size, want in zip(sizes, shape, strict=True):
            if want is not None and size != want:
                break
        else:
            return
    expected = ", ".join("*" if size is None else str(size) for size in shape)
    raise ValueError(f"{name}: expected shape [{expected}], got {list(sizes)}")


def expect_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` has a floating-point dtype."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")


def expect_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless the dtype of ``tensor`` is one of ``dtypes``."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")


def expect_destination(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise unless ``tensor``, which a result is written to, is contiguous and of this shape and dtype."""
    expect_shape(name, tensor, shape)
    expect_dtype(name, tensor, (dtype,))
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")


def expect_indices(name: str, indices: Tensor, low: int, high: int) -> None:
    """Raise unless ``indices`` are int32 or int64 within [low, high)."""
    expect_dtype(name, indices, INTEGERS)
    if indices.is_cpu and not torch.compiler.is_compiling() and (count := indices.numel()):
        if count == 1:
            smallest = largest = indices.item()
        elif count <= FEW:
            values = (indices if indices.dim() == 1 else indices.flatten()).tolist()
            smallest, largest = min(values), max(values)
        else:
            smallest, largest = (int(value) for value in torch.aminmax(indices))
        if smallest < low or largest >= high:
            raise IndexError(f"{name}: expected indices within [{low}, {high}), got [{smallest}, {largest}]")


def expect_query_start_loc(query_start_loc: Tensor, num_tokens: int) -> int:
    """Check ragged offsets [N + 1] that rise from 0 to ``num_tokens``; return N."""
    expect_shape("query_start_loc", query_start_loc, (None,))
    expect_dtype("query_start_loc", query_start_loc, INTEGERS)
    count = query_start_loc.numel()
    if count == 0:
        raise ValueError("query_start_loc: expected at least one offset, got none")
    if query_start_loc.is_cpu:
        offsets = query_start_loc.tolist()
        if offsets[0] != 0 or offsets[-1] != num_tokens or (count > 2 and offsets != sorted(offsets)):
            raise ValueError(f"query_start_loc: expected offsets rising from 0 to {num_tokens}, got {offsets}")
    return count - 1


def longest_sequence(query_start_loc: Tensor) -> int:
    """The most tokens of a sequence, from offsets [N + 1] on a CPU; 0 where there is no sequence."""
    return max((end - start for start, end in pairwise(query_start_loc.tolist())), default=0)


def expect_snapshots(
    snapshot_slots: Tensor, snapshot_lengths: Tensor, query_start_loc: Tensor, num_slots: int, *, multiple_of: int = 1
) -> None:
    """Check, for N sequences, further slots [N] and after how many tokens [N] they are written; slot −1 is none."""
    num_sequences = query_start_loc.numel() - 1
    expect_shape("snapshot_slots", snapshot_slots, (num_sequences,))
    expect_indices("snapshot_slots", snapshot_slots, -1, num_slots)
    expect_shape("snapshot_lengths", snapshot_lengths, (num_sequences,))
    expect_dtype("snapshot_lengths", snapshot_lengths, INTEGERS)
    if query_start_loc.is_cpu:
        lengths = query_start_loc.diff()
        fits = (snapshot_lengths >= 0) & (snapshot_lengths <= lengths) & (snapshot_lengths % multiple_of == 0)
        if not bool((fits | (snapshot_slots < 0)).all()):
            raise ValueError(
                f"snapshot_lengths: expected multiples of {multiple_of} from 0 to {lengths.tolist()} for slots "
                f"{snapshot_slots.tolist()}, got {snapshot_lengths.tolist()}"
            )


def expect_both_or_neither(
    first: str, one: Tensor | None, second: str, other: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Return both tensors, None where neither is given; raise ValueError where only one is."""
    if one is not None and other is not None:
        return one, other
    if one is not None or other is not None:
        missing, given = (first, second) if one is None else (second, first)
        raise ValueError(f"{missing}: expected a tensor because {given} is given, got None")
    return None
