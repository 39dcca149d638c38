from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qnext_kernels import force_backend, silu_and_mul, topk_softmax
from qnext_kernels.moe.reference import ReferenceBackend
from tests.kernels.kernel_inputs import DTYPES, assert_close, same_bits

REFERENCE = ReferenceBackend()
EXPERTS = (1, 7, 8, 9, 15, 16, 17, 37, 512)
"""Numbers of experts around the width of a vector, and the model's."""


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    with force_backend("native"):
        yield


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_experts", EXPERTS)
def test_topk_softmax_agrees_with_the_reference(num_experts: int, dtype: torch.dtype, renormalize: bool) -> None:
    # Distinct in bfloat16 too.
    logits = torch.stack([torch.randperm(num_experts) for _ in range(5)]).sub(num_experts // 2).mul(2.0**-4).to(dtype)
    for top_k in {1, min(10, num_experts), num_experts}:
        weights, ids = topk_softmax(logits, top_k, renormalize)
        truth, truth_ids = REFERENCE.topk_softmax(logits.double(), top_k, renormalize)
        assert weights.dtype == torch.float32
        assert same_bits(ids, truth_ids)
        assert_close(weights, truth, {torch.float32: num_experts})
        assert (weights.diff(dim=1) <= 0).all()


def test_of_equal_probabilities_the_lower_index_comes_first() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 1.0, 2.0, 1.0, 0.0, 1.0, -torch.inf, -torch.inf]])
    _, ids = topk_softmax(logits, 10, True)
    assert ids.tolist() == [[4, 1, 3, 5, 7, 0, 2, 6, 8, 9]]
    _, ids = topk_softmax(torch.zeros(3, 512, dtype=torch.bfloat16), 10, True)
    assert ids.tolist() == [list(range(10))] * 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("num_experts", [9, 512])
def test_experts_are_valid_and_differ_whatever_the_logits(num_experts: int, bad: float) -> None:
    logits = torch.randn(4, num_experts)
    logits[0] = bad
    logits[1, ::3] = bad
    logits[2, -1] = bad
    weights, ids = topk_softmax(logits, 8, True)
    truth, _ = REFERENCE.topk_softmax(logits, 8, True)
    assert torch.equal(weights.isnan(), truth.isnan())
    for row in ids.tolist():
        assert len(set(row)) == 8
        assert set(row) <= set(range(num_experts))


def test_extreme_logits_do_not_overflow() -> None:
    weights, ids = topk_softmax(torch.tensor([[1e30, -1e30, 3e38, 0.0]]), 2, True)
    assert weights.tolist() == [[1.0, 0.0]]
    assert ids.tolist() == [[2, 0]]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_experts", [37, 512])
def test_topk_softmax_of_a_token_does_not_depend_on_the_batch(num_experts: int, dtype: torch.dtype) -> None:
    logits = torch.randn(100, num_experts, dtype=dtype)
    together = topk_softmax(logits, 10, True)
    alone = [topk_softmax(row[None], 10, True) for row in logits]
    for n, whole in enumerate(together):
        assert same_bits(whole, torch.cat([one[n] for one in alone]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views_are_read_as_they_lie(dtype: torch.dtype) -> None:
    wide = torch.randn(6, 3, 100, dtype=dtype)
    for x in (wide[:, 1, 3:41], wide[:, 1:, 3:41], wide[::2, 0], wide.transpose(0, 1), wide.transpose(0, 2), wide[0]):
        assert same_bits(silu_and_mul(x), silu_and_mul(x.contiguous()))
        if x.dim() == 2:
            for strided, whole in zip(topk_softmax(x, 3, True), topk_softmax(x.contiguous(), 3, True), strict=True):
                assert same_bits(strided, whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 17, 31, 512])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (0,), (2, 3), (2, 1, 3)])
def test_silu_and_mul_agrees_with_the_reference(shape: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    x = torch.randn(*shape, 2 * width, dtype=dtype) * 3
    out, truth = silu_and_mul(x), REFERENCE.silu_and_mul(x.double())
    assert out.shape == truth.shape
    assert out.dtype == dtype
    assert_close(out, truth, {torch.float32: 5})


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 512])
def test_silu_and_mul_of_a_row_does_not_depend_on_the_batch(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(100, 2 * width, dtype=dtype)
    assert same_bits(silu_and_mul(x), torch.cat([silu_and_mul(row[None]) for row in x]))


def test_silu_and_mul_of_infinities_is_that_of_the_reference() -> None:
    gate = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e4, -1e4, 0.0, -0.0, 100.0])
    x = torch.cat([gate, torch.full((8,), 2.0)])
    torch.testing.assert_close(silu_and_mul(x), REFERENCE.silu_and_mul(x), equal_nan=True)
