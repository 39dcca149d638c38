"""The largest values of a row in an order that depends on the row alone."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_first(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``torch.topk`` of the last axis, in which of equal values that of the lower index comes first.

    torch.topk orders equal values as its algorithm comes across them, which depends on ``count``; with this function a
    row's first k are the same whatever larger number another row of the batch asks for.

    Args:
        values: [T, N], any float dtype, without NaN.
        count: 0 to N.

    Returns:
        The values [T, count] in the dtype of ``values``, and their indices [T, count] int64.
    """
    if not count or not len(values):
        shape = (len(values), count)
        return values.new_empty(shape), torch.empty(shape, dtype=torch.int64, device=values.device)
    smallest = values.topk(count, dim=1).values[:, -1:]
    rows, columns = (values >= smallest).nonzero(as_tuple=True)  # row by row, columns ascending
    counts = torch.bincount(rows, minlength=len(values))
    places = torch.arange(len(rows), device=values.device) - (counts.cumsum(0) - counts)[rows]
    # One line a row, padded with the least there is: its place behind all others keeps it out.
    candidates = values.new_full((len(values), int(counts.max())), float("-inf"))
    candidates[rows, places] = values[rows, columns]
    indices = torch.zeros(candidates.shape, dtype=torch.int64, device=values.device)
    indices[rows, places] = columns
    ordered, order = candidates.sort(dim=1, descending=True, stable=True)
    return ordered[:, :count], indices.gather(1, order[:, :count])
