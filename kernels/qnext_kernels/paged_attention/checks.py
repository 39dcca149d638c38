"""The values that attention over a paged cache reads as indices."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from qnext_kernels.checks import expect_indices, expect_query_start_loc


def check_values(
    block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor, num_tokens: int, num_blocks: int, block_size: int
) -> None:
    """Raise unless offsets, lengths and the blocks that are read lie within what they point into."""
    expect_query_start_loc(query_start_loc, num_tokens)
    if not seq_lens.numel():
        return
    lengths, offsets = seq_lens.tolist(), query_start_loc.tolist()
    most = block_table.shape[1] * block_size
    for length, (start, end) in zip(lengths, pairwise(offsets), strict=True):
        if not end - start <= length <= most:
            raise ValueError(
                f"seq_lens: expected at least the new tokens {query_start_loc.diff().tolist()} and at most {most} "
                f"(what a row of block_table holds), got {lengths}"
            )
    used = block_table[:, : -(-max(lengths) // block_size)]
    if len(lengths) > 1:
        behind = torch.arange(used.shape[1]) * block_size >= seq_lens[:, None]
        used = used.masked_fill(behind, 0)
    expect_indices("block_table", used, 0, max(1, num_blocks))
