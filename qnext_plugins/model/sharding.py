"""Parameters that a rank holds a share of, where no parallel linear of the engine makes them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def sharded_parameter(segments: tuple[int, ...], *rest: int, dtype: torch.dtype, rank: int, ranks: int) -> nn.Parameter:
    """A parameter [Σ segments / ranks, *rest], each segment of dim 0 split over the ranks, in order.

    Its ``weight_loader(parameter, loaded)``, which the engines' loaders call, copies this rank's share of the whole.
    """
    parameter = nn.Parameter(torch.empty(sum(segments) // ranks, *rest, dtype=dtype), requires_grad=False)
    loader = partial(load_segments, segments=segments, rank=rank, ranks=ranks)
    parameter.weight_loader = loader  # type: ignore[attr-defined]
    return parameter


def load_segments(parameter: Tensor, loaded: Tensor, *, segments: tuple[int, ...], rank: int, ranks: int) -> None:
    """Copy this rank's share of each segment along dim 0 of ``loaded`` into ``parameter``."""
    shares = [segment.chunk(ranks)[rank] for segment in loaded.split(segments)]
    parameter.data.copy_(torch.cat(shares))
