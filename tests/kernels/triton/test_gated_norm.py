"""The gated RMSNorm in Triton, interpreted."""

from __future__ import annotations

import pytest
import torch

from qnext_kernels import gated_rms_norm
from tests.kernels import test_gated_norm as of_any_backend
from tests.kernels.kernel_inputs import same_bits
from tests.kernels.triton.interpreter import shuffled_programs
from tests.kernels.triton.reuse import served_by_triton

pytestmark = pytest.mark.usefixtures("interpreter")

test_agrees_with_float64_and_rounds_once = served_by_triton(of_any_backend.test_agrees_with_float64_and_rounds_once)
test_agrees_with_transformers = served_by_triton(of_any_backend.test_agrees_with_transformers)
test_gate_and_weight_may_have_other_dtypes = served_by_triton(of_any_backend.test_gate_and_weight_may_have_other_dtypes)
test_a_row_does_not_depend_on_the_batch = served_by_triton(of_any_backend.test_a_row_does_not_depend_on_the_batch)
test_strided_views_have_the_bits_of_contiguous_rows = served_by_triton(
    of_any_backend.test_strided_views_have_the_bits_of_contiguous_rows
)
test_a_destination_gets_the_bits_of_the_result_and_may_be_the_input = served_by_triton(
    of_any_backend.test_a_destination_gets_the_bits_of_the_result_and_may_be_the_input
)


def test_float16_agrees_with_float64() -> None:
    of_any_backend.test_agrees_with_float64_and_rounds_once("triton", (5, 4, 128), torch.float16)


def test_a_row_does_not_depend_on_the_order_of_programs() -> None:
    x, weight = torch.randn(2, 50, 3, 64).bfloat16(), torch.randn(64)
    expected = gated_rms_norm(x[0], x[1], weight, 1e-6)
    with shuffled_programs(seed=1):
        assert same_bits(gated_rms_norm(x[0], x[1], weight, 1e-6), expected)
