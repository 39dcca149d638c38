"""The checks read values on a CPU alone: on a GPU that would make the host wait."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.checks import expect_indices, expect_query_start_loc, expect_snapshots


def on_another_device(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Indices without values: to read one is an error."""
    return torch.empty(shape, dtype=dtype, device="meta")


def test_values_on_another_device_are_not_read() -> None:
    expect_indices("slots", on_another_device(3), -1, 9)
    assert expect_query_start_loc(on_another_device(4), 7) == 3
    expect_snapshots(on_another_device(3), on_another_device(3), on_another_device(4), 9, multiple_of=64)
