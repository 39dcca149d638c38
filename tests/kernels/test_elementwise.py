from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qnext_kernels.elementwise import sigmoid, silu, softplus
from tests.kernels.kernel_inputs import assert_close, same_bits

Function = Callable[[Tensor], Tensor]
PAIRS: list[tuple[Function, Function]] = [(sigmoid, torch.sigmoid), (silu, F.silu), (softplus, F.softplus)]
EXTREMES = [1e4, -1e4, float("inf"), float("-inf"), 0.0, -0.0, 1e-30, 88.7, -88.7, 104.0, -104.0]


def values(dtype: torch.dtype) -> Tensor:
    """A length that no vector width divides, so that the last elements are a tail."""
    return torch.cat([torch.randn(1000) * 10, torch.linspace(-120, 120, 997), torch.tensor(EXTREMES)]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [sigmoid, silu, softplus])
def test_value_does_not_depend_on_position_in_the_tensor(function: Function, dtype: torch.dtype) -> None:
    x = values(dtype)
    whole = function(x)
    assert same_bits(whole, torch.stack([function(element) for element in x]))
    assert same_bits(whole[1:], function(x[1:]))
    assert same_bits(whole, torch.cat([function(part.clone()) for part in x.split(13)]))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("function", [sigmoid, silu, softplus])
def test_value_does_not_depend_on_the_threads_that_share_a_large_tensor(function: Function) -> None:
    x = torch.randn(100_003) * 10
    assert same_bits(function(x), torch.cat([function(part.clone()) for part in x.split(997)]))


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_agrees_with_torch_in_float64(ours: Function, torchs: Function) -> None:
    x = values(torch.float32)
    x = x[x.isfinite()]
    assert_close(ours(x), torchs(x.double()), {torch.float32: 4})


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_extremes_are_those_of_torch(ours: Function, torchs: Function) -> None:
    x = torch.tensor([1e4, -1e4, float("inf"), float("-inf")])
    torch.testing.assert_close(ours(x), torchs(x), rtol=0, atol=0, equal_nan=True)
