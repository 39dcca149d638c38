from __future__ import annotations

import pytest
import torch

from qnext_plugins.largest import largest_first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 50])
def test_the_largest_come_first_and_of_equals_that_of_the_lower_index(count: int, dtype: torch.dtype) -> None:
    values = torch.randint(0, 9, (20, 50), generator=torch.Generator().manual_seed(0)).to(dtype)
    found, indices = largest_first(values, count)
    for row, chosen in zip(values.tolist(), indices.tolist(), strict=True):
        assert chosen == sorted(range(50), key=lambda n: (-row[n], n))[:count]
    assert torch.equal(found, values.gather(1, indices))


def test_a_rows_first_do_not_depend_on_how_many_are_asked_for_nor_on_other_rows() -> None:
    values = torch.randint(0, 5, (9, 40), generator=torch.Generator().manual_seed(1)).float()
    _, many = largest_first(values, 40)
    for row in range(9):
        for count in range(1, 40):
            assert torch.equal(largest_first(values[row : row + 1], count)[1][0], many[row, :count])


def test_what_is_masked_comes_last_in_order() -> None:
    masked = torch.tensor([[float("-inf"), 1.0, float("-inf"), 3.0], [float("-inf")] * 4])
    values, indices = largest_first(masked, 4)
    assert indices.tolist() == [[3, 1, 0, 2], [0, 1, 2, 3]]
    assert values[0].tolist() == [3.0, 1.0, float("-inf"), float("-inf")]


def test_no_rows_give_none() -> None:
    values, indices = largest_first(torch.empty(0, 4), 2)
    assert values.shape == indices.shape == (0, 2)
