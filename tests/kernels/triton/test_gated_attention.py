"""Split, QK-norm, partial RoPE and output gate in Triton, interpreted."""

from __future__ import annotations

import pytest
import torch

from qnext_kernels import qk_norm_rope_gate, sigmoid_gate
from qnext_kernels.gated_attention.triton import TritonGatedAttention
from tests.kernels import test_gated_attention as of_any_backend
from tests.kernels.kernel_inputs import same_bits
from tests.kernels.test_gated_attention import LAYOUTS, MAX_POSITION, Layout, arguments
from tests.kernels.triton.interpreter import shuffled_programs
from tests.kernels.triton.reuse import served_by_triton

pytestmark = pytest.mark.usefixtures("interpreter")

test_agrees_with_float64_and_rounds_once = served_by_triton(of_any_backend.test_agrees_with_float64_and_rounds_once)
test_agrees_with_the_lines_of_transformers_attention = served_by_triton(
    of_any_backend.test_agrees_with_the_lines_of_transformers_attention
)
test_reads_a_projection_that_is_a_slice_of_a_wider_tensor = served_by_triton(
    of_any_backend.test_reads_a_projection_that_is_a_slice_of_a_wider_tensor
)
test_weights_and_table_may_have_other_dtypes = served_by_triton(
    of_any_backend.test_weights_and_table_may_have_other_dtypes
)
test_weights_table_and_positions_of_any_stride_are_read = served_by_triton(
    of_any_backend.test_weights_table_and_positions_of_any_stride_are_read
)
test_positions_may_be_int32_or_int64 = served_by_triton(of_any_backend.test_positions_may_be_int32_or_int64)
test_sigmoid_gate_agrees_with_float64_and_rounds_once = served_by_triton(
    of_any_backend.test_sigmoid_gate_agrees_with_float64_and_rounds_once
)
test_sigmoid_gate_reads_views_and_other_dtypes = served_by_triton(
    of_any_backend.test_sigmoid_gate_reads_views_and_other_dtypes
)
test_sigmoid_gate_of_a_row_does_not_depend_on_the_batch = served_by_triton(
    of_any_backend.test_sigmoid_gate_of_a_row_does_not_depend_on_the_batch
)


@pytest.mark.parametrize(("layout", "dtype"), [(LAYOUTS[1], torch.bfloat16), (LAYOUTS[4], torch.float32)])
def test_a_token_does_not_depend_on_the_batch(layout: Layout, dtype: torch.dtype) -> None:
    of_any_backend.test_a_token_does_not_depend_on_the_batch("triton", layout, dtype)


def test_float16_agrees_with_float64() -> None:
    of_any_backend.test_agrees_with_float64_and_rounds_once("triton", LAYOUTS[1], torch.float16, 3)
    of_any_backend.test_sigmoid_gate_agrees_with_float64_and_rounds_once("triton", (3, 2100), (3, 1), torch.float16)


def test_a_position_outside_of_the_table_is_not_read_and_leaves_other_tokens_alone() -> None:
    given = arguments(LAYOUTS[0], 5, torch.float32)
    expected = qk_norm_rope_gate(**given)
    wrong = given["positions"].clone()
    wrong[1], wrong[3] = MAX_POSITION, -1
    # As on a GPU, where the public function does not read them.
    ours = TritonGatedAttention().qk_norm_rope_gate(**(given | {"positions": wrong}))
    for result, whole in zip(ours, expected, strict=True):
        assert same_bits(result[[0, 2, 4]], whole[[0, 2, 4]])
    heads, _, head_dim, rotary_dim = LAYOUTS[0]
    rotated = ours[0].view(5, heads, head_dim)[[1, 3], :, :rotary_dim]
    assert not rotated.any()


def test_results_do_not_depend_on_the_order_of_programs() -> None:
    given = arguments(LAYOUTS[0], 21, torch.bfloat16)
    x, gate = torch.randn(2, 40, 300)
    expected = *qk_norm_rope_gate(**given), sigmoid_gate(x, gate)
    with shuffled_programs(seed=1):
        shuffled = *qk_norm_rope_gate(**given), sigmoid_gate(x, gate)
    assert all(same_bits(ours, theirs) for ours, theirs in zip(shuffled, expected, strict=True))
