"""The router's top-k and SwiGLU's middle in Triton, interpreted: what the tests of the native kernels demand."""

from __future__ import annotations

import pytest
import torch

from qnext_kernels import silu_and_mul, topk_softmax
from tests.kernels import test_moe as of_any_backend
from tests.kernels import test_router as of_native
from tests.kernels.kernel_inputs import assert_close, same_bits
from tests.kernels.test_router import (  # noqa: F401
    test_experts_are_valid_and_differ_whatever_the_logits,
    test_extreme_logits_do_not_overflow,
    test_of_equal_probabilities_the_lower_index_comes_first,
    test_silu_and_mul_agrees_with_the_reference,
    test_silu_and_mul_of_infinities_is_that_of_the_reference,
    test_strided_views_are_read_as_they_lie,
)
from tests.kernels.triton.interpreter import shuffled_programs
from tests.kernels.triton.reuse import served_by_triton

pytestmark = pytest.mark.usefixtures("interpreter")

test_topk_softmax_agrees_with_float64 = served_by_triton(of_any_backend.test_topk_softmax_agrees_with_float64)
test_silu_and_mul_agrees_with_float64_and_rounds_once = served_by_triton(
    of_any_backend.test_silu_and_mul_agrees_with_float64_and_rounds_once
)
test_silu_and_mul_of_a_row_does_not_depend_on_the_batch = served_by_triton(
    of_any_backend.test_silu_and_mul_of_a_row_does_not_depend_on_the_batch
)


@pytest.mark.parametrize("num_experts", [1, 7, 17])
def test_topk_softmax_of_few_experts_agrees_with_the_reference(num_experts: int) -> None:
    of_native.test_topk_softmax_agrees_with_the_reference(num_experts, torch.bfloat16, renormalize=True)


def test_topk_softmax_of_a_token_does_not_depend_on_the_batch() -> None:
    of_any_backend.test_topk_softmax_of_a_token_does_not_depend_on_the_batch("triton", torch.bfloat16)


@pytest.mark.parametrize("renormalize", [True, False])
def test_logits_in_float16_and_more_of_them_than_a_warp_holds(renormalize: bool) -> None:
    logits = torch.randperm(1500).sub(750).mul(2.0**-6).half()[None]
    weights, ids = topk_softmax(logits, 10, renormalize)
    truth, expected = torch.softmax(logits.double(), dim=-1).topk(10)
    assert torch.equal(ids.long(), expected)
    assert_close(weights, truth / truth.sum() if renormalize else truth, {torch.float32: 1500})


def test_rows_wider_than_a_program() -> None:
    x = torch.randn(3, 2 * 2100).half()
    gate, up = x.double().chunk(2, dim=-1)
    assert_close(silu_and_mul(x), gate * torch.sigmoid(gate) * up, {torch.float32: 5})


def test_results_do_not_depend_on_the_order_of_programs() -> None:
    logits, x = torch.randn(9, 37), torch.randn(50, 600)
    expected = *topk_softmax(logits, 5, True), silu_and_mul(x)
    with shuffled_programs(seed=1):
        shuffled = *topk_softmax(logits, 5, True), silu_and_mul(x)
    assert all(same_bits(ours, theirs) for ours, theirs in zip(shuffled, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_of_zeros_of_either_sign_the_lower_index_comes_first(dtype: torch.dtype) -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0, -2.0, -torch.inf]], dtype=dtype)
    weights, ids = topk_softmax(logits, 7, False)
    assert ids.tolist() == [[1, 2, 3, 4, 0, 5, 6]]
    assert_close(weights, torch.softmax(logits.double(), dim=-1).sort(descending=True).values, {torch.float32: 7})
