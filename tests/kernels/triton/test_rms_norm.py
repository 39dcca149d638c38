"""The zero-centred RMSNorm in Triton, interpreted."""

from __future__ import annotations

import pytest
import torch

from qnext_kernels import rms_norm
from tests.kernels import test_rms_norm as of_any_backend
from tests.kernels.kernel_inputs import same_bits
from tests.kernels.test_rms_norm import test_a_row_of_zeros_is_finite  # noqa: F401
from tests.kernels.triton.interpreter import shuffled_programs
from tests.kernels.triton.reuse import served_by_triton

pytestmark = pytest.mark.usefixtures("interpreter")

test_agrees_with_float64_and_rounds_once = served_by_triton(of_any_backend.test_agrees_with_float64_and_rounds_once)
test_agrees_with_transformers = served_by_triton(of_any_backend.test_agrees_with_transformers)
test_the_weight_may_have_another_dtype = served_by_triton(of_any_backend.test_the_weight_may_have_another_dtype)
test_a_row_does_not_depend_on_the_batch = served_by_triton(of_any_backend.test_a_row_does_not_depend_on_the_batch)
test_strided_views_have_the_bits_of_contiguous_rows = served_by_triton(
    of_any_backend.test_strided_views_have_the_bits_of_contiguous_rows
)


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", [(3, 2048), (2, 4100), (65, 48)])
def test_float16_and_rows_of_any_width(shape: tuple[int, int], with_residual: bool) -> None:
    of_any_backend.test_agrees_with_float64_and_rounds_once("triton", shape, torch.float16, with_residual)


def test_a_row_does_not_depend_on_the_order_of_programs() -> None:
    x, weight = torch.randn(2, 50, 512).bfloat16(), torch.randn(512)
    expected = rms_norm(x[0], weight, 1e-6, x[1])
    with shuffled_programs(seed=1):
        shuffled = rms_norm(x[0], weight, 1e-6, x[1])
    assert all(same_bits(ours, theirs) for ours, theirs in zip(shuffled, expected, strict=True))
