"""A prefill of the convolution on what a projection leaves, grouped by key head, has the bits of one on [T, D]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qnext_kernels import causal_conv1d_prefill, force_backend
from tests.kernels.kernel_inputs import (
    DTYPES,
    Bad,
    distinct_slots,
    nan_pool,
    same_bits,
    start_offsets,
)

WIDTH, SLOTS = 4, 12
SHAPES = [(1, 1, 0), (3, 5, 12), (2, 40, 600), (2, 128, 256)]
"""Key heads, key dim and the values of a key head: less than a vector, a vector and more, and more than a block."""
Shape = tuple[int, int, int]
Inputs = tuple[Tensor, Tensor, Tensor]


def random_inputs(shape: Shape, tokens: int, dtype: torch.dtype) -> Inputs:
    """x as columns of a wider projection, the same head by head [T, D], and a weight."""
    heads, key_dim, values = shape
    x = torch.randn(tokens, heads, 2 * key_dim + values + 7).to(dtype)[:, :, 3:-4]
    parts: list[list[Tensor]] = [[], [], []]
    for head in range(heads):
        for part, columns in zip(parts, x[:, head].split([key_dim, key_dim, values], dim=1), strict=True):
            part.append(columns)
    mixed = torch.cat([*parts[0], *parts[1], *parts[2]], dim=1)
    return x, mixed, (torch.randn(mixed.shape[1], WIDTH) / 2).to(dtype)


def inputs_and_pool(
    shape: Shape, tokens: int, dtype: torch.dtype, pool_dtype: torch.dtype, channels_last: bool
) -> tuple[Inputs, Tensor]:
    """Random inputs, and a pool of earlier ones with room for two drafts."""
    inputs = random_inputs(shape, tokens, dtype)
    sizes = (inputs[1].shape[1], WIDTH + 1)
    if channels_last:
        pool = nan_pool(SLOTS, sizes[::-1], pool_dtype).transpose(1, 2)
    else:
        pool = nan_pool(SLOTS, sizes, pool_dtype)
    return inputs, pool.normal_()


def assert_same_bits(inputs: Inputs, key_dim: int, pool: Tensor, *where: Tensor) -> None:
    x, mixed, weight = inputs
    plain = pool.clone()
    y = causal_conv1d_prefill(x, weight, pool, *where, key_dim=key_dim)
    assert same_bits(y, causal_conv1d_prefill(mixed, weight, plain, *where))
    assert same_bits(pool, plain)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "pool_dtype"), [(x, pool) for x in DTYPES for pool in DTYPES])
@pytest.mark.parametrize(
    ("backend", "shape"), [*(("native", shape) for shape in SHAPES), ("cpu", SHAPES[1]), ("reference", SHAPES[1])]
)
def test_it_has_the_bits_of_the_channels_one_after_the_other(
    backend: str, shape: Shape, dtype: torch.dtype, pool_dtype: torch.dtype, channels_last: bool
) -> None:
    lengths = [70, 1, 0, 2, 61, 3]
    slots, snapshot_slots = distinct_slots(12, SLOTS).view(2, 6)
    slots[-1] = snapshot_slots[1] = -1
    where = slots, start_offsets(lengths), torch.arange(6) % 2 > 0
    with force_backend(backend):
        inputs, pool = inputs_and_pool(shape, sum(lengths), dtype, pool_dtype, channels_last)
        assert_same_bits(inputs, shape[1], pool, *where)
        assert_same_bits(inputs, shape[1], pool, *where, snapshot_slots, torch.tensor([64, 0, 0, 1, 61, 0]))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("shape", "tokens"), [((2, 128, 256), 8200), ((2, 16, 32), 65600)])
def test_results_larger_than_a_cache_have_the_same_bits(shape: Shape, tokens: int) -> None:
    inputs = random_inputs(shape, tokens, torch.bfloat16)
    pool = torch.randn(2, inputs[1].shape[1], WIDTH - 1).bfloat16()
    where = torch.tensor([1, 0]), start_offsets([5, tokens - 5]), torch.tensor([True, True])
    with force_backend("native"):
        assert_same_bits(inputs, shape[1], pool, *where)


@pytest.mark.parametrize(
    "bad",
    [
        Bad("x", "two dimensions", lambda x: x.flatten(1), ValueError),
        Bad("weight", "of other channels", lambda x: x[1:], ValueError),
        Bad("conv_state", "of other channels", lambda x: x[:, 1:], ValueError),
        Bad("key_dim", "none", lambda x: 0, ValueError),
        Bad("key_dim", "more than half", lambda x: 12, ValueError),
    ],
    ids=str,
)
def test_bad_input_is_refused_by_name_before_anything_is_written(bad: Bad) -> None:
    x, _, weight = random_inputs((3, 5, 12), 4, torch.float32)
    pool = torch.randn(2, len(weight), WIDTH - 1)
    given: dict[str, Any] = {"x": x, "weight": weight, "conv_state": pool, "slots": torch.tensor([1]), "key_dim": 5}
    given |= {"query_start_loc": start_offsets([4]), "has_initial_state": torch.tensor([True])}
    before = pool.clone()
    with pytest.raises(bad.error, match=f"^{bad.argument}: expected"):
        causal_conv1d_prefill(**(given | {bad.argument: bad.change(given[bad.argument])}))
    assert torch.equal(pool, before)
