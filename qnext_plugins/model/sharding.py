"""Parameters that a rank holds a share of, where no parallel linear of the engine makes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sharded_parameter(segments: tuple[int, ...], *rest: int, dtype: torch.dtype, rank: int, ranks: int) -> nn.Parameter:
    """A parameter [Σ segments / ranks, *rest], each segment of dim 0 split over the ranks, in order.

    Its ``weight_loader(param, loaded_weight)``, which the engines' loaders call, copies this rank's share of the whole.
    """
    parameter = nn.Parameter(torch.empty(sum(segments) // ranks, *rest, dtype=dtype), requires_grad=False)

    # A function with these names, as the engines' own: when vLLM loads weights again, it puts another ``param`` in.
    def weight_loader(param: Tensor, loaded_weight: Tensor) -> None:
        shares = [segment.chunk(ranks)[rank] for segment in loaded_weight.split(segments)]
        param.data.copy_(torch.cat(shares))

    parameter.weight_loader = weight_loader  # type: ignore[attr-defined]
    return parameter
