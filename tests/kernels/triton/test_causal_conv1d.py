"""The convolution in Triton, interpreted: numbers, promises, and no lane out of bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qnext_kernels import causal_conv1d_decode, causal_conv1d_prefill, causal_conv1d_verify
from qnext_kernels.causal_conv1d import triton_conv
from qnext_kernels.causal_conv1d.triton import TritonCausalConv1d
from tests.kernels import test_causal_conv1d as of_any_backend
from tests.kernels import test_causal_conv1d_grouped as of_grouped_inputs
from tests.kernels.kernel_inputs import assert_close, distinct_slots, memory, only_written, same_bits, start_offsets
from tests.kernels.test_causal_conv1d import (
    CHANNELS,
    DRAFTS,
    decode,
    make_pool,
    make_weight,
    past_inputs,
    prefill,
    random_history,
    roundings,
    verify,
)
from tests.kernels.triton.interpreter import shuffled_programs
from tests.kernels.triton.reuse import served_by_triton

pytestmark = pytest.mark.usefixtures("interpreter", "lengths_around_blocks")

CASES = [
    (4, torch.bfloat16, torch.bfloat16, "channels last"),
    (4, torch.bfloat16, torch.float32, "channels first"),
    (2, torch.float32, torch.bfloat16, "channels first"),
    (4, torch.float32, torch.float32, "channels last"),
]
NAMES = ("width", "dtype", "pool_dtype", "layout")
cases = pytest.mark.parametrize(NAMES, CASES)
two_cases = pytest.mark.parametrize(NAMES, CASES[1:3])


@pytest.fixture
def lengths_around_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths of sequences around the 8 tokens of a run and the 128 of a program of a prefill, and a few snapshots."""
    monkeypatch.setattr(of_any_backend, "LENGTHS", (0, 1, 2, 3, 4, 7, 8, 9, 127, 128, 129))
    monkeypatch.setattr(of_any_backend, "SNAPSHOTS", [(0, 0), (1, 0), (2, 1), (3, 3), (33, 2), (130, 128), (35, 35)])


@cases
def test_prefill_agrees_with_float64(width: int, dtype: torch.dtype, pool_dtype: torch.dtype, layout: str) -> None:
    of_any_backend.test_prefill_agrees_with_float64("triton", width, dtype, pool_dtype, layout)


@cases
def test_verify_agrees_with_float64(width: int, dtype: torch.dtype, pool_dtype: torch.dtype, layout: str) -> None:
    of_any_backend.test_verify_agrees_with_float64("triton", width, dtype, pool_dtype, layout)


@cases
def test_decode_agrees_with_float64(width: int, dtype: torch.dtype, pool_dtype: torch.dtype, layout: str) -> None:
    of_any_backend.test_decode_agrees_with_float64("triton", width, dtype, pool_dtype, layout)


test_decode_and_its_state_agree_with_transformers = served_by_triton(
    of_any_backend.test_decode_and_its_state_agree_with_transformers
)
test_float16_is_served = served_by_triton(of_any_backend.test_float16_is_served)
test_verify_into_an_empty_step_pool_only_reads_the_state = served_by_triton(
    of_any_backend.test_verify_into_an_empty_step_pool_only_reads_the_state
)
test_an_empty_batch_is_served = served_by_triton(of_any_backend.test_an_empty_batch_is_served)


@two_cases
def test_verify_equals_repeated_decode_bitwise(
    width: int, dtype: torch.dtype, pool_dtype: torch.dtype, layout: str
) -> None:
    of_any_backend.test_verify_equals_repeated_decode_bitwise("triton", width, dtype, pool_dtype, layout)


def test_tokens_that_were_not_accepted_leave_no_trace() -> None:
    of_any_backend.test_tokens_that_were_not_accepted_leave_no_trace("triton", 4, torch.bfloat16, "channels last")


@two_cases
def test_prefill_equals_decode_and_verify_and_is_split_anywhere_bitwise(
    width: int, dtype: torch.dtype, pool_dtype: torch.dtype, layout: str
) -> None:
    of_any_backend.test_prefill_of_few_tokens_equals_verify_and_of_one_equals_decode_bitwise(
        "triton", width, dtype, pool_dtype
    )
    of_any_backend.test_prefill_split_anywhere_equals_unsplit_bitwise("triton", width, dtype, pool_dtype)


@two_cases
def test_a_prefill_split_around_blocks_equals_unsplit_bitwise(
    width: int, dtype: torch.dtype, pool_dtype: torch.dtype, layout: str
) -> None:
    weight, pool, x = make_weight(width, dtype), make_pool(9, width, pool_dtype, layout), torch.randn(140, CHANNELS)
    x = x.to(dtype)
    (whole,) = prefill(weight, pool, [x], [None])
    for cut in (7, 8, 9, 127, 128, 139):
        ((head, state),) = prefill(weight, pool, [x[:cut]], [None])
        ((tail, state),) = prefill(weight, pool, [x[cut:]], [state])
        of_any_backend.assert_same((torch.cat([head, tail]), state), whole)


@two_cases
def test_a_snapshot_equals_a_prefill_of_its_tokens_and_changes_nothing_else_bitwise(
    width: int, dtype: torch.dtype, pool_dtype: torch.dtype, layout: str
) -> None:
    of_any_backend.test_a_snapshot_equals_a_prefill_of_its_tokens_and_changes_nothing_else_bitwise(
        "triton", width, dtype, pool_dtype, layout
    )


@pytest.mark.parametrize(
    ("width", "dtype", "pool_dtype", "layout", "drafts"),
    [
        (4, torch.bfloat16, torch.bfloat16, "shared columns", 0),
        (2, torch.float32, torch.bfloat16, "by steps", DRAFTS),
        (4, torch.bfloat16, torch.float32, "by rows", DRAFTS),
    ],
)
def test_verify_with_a_step_pool_equals_decode_and_verify_in_place_bitwise_and_only_reads_the_state(
    width: int, dtype: torch.dtype, pool_dtype: torch.dtype, layout: str, drafts: int
) -> None:
    of_any_backend.test_verify_with_a_step_pool_equals_repeated_decode_and_only_reads_the_state_bitwise(
        "triton", width, dtype, pool_dtype, layout, drafts
    )
    of_any_backend.test_verify_with_a_step_pool_agrees_with_verify_in_place_bitwise_and_with_float64(
        "triton", width, dtype, pool_dtype, layout
    )


def test_a_channel_depends_neither_on_those_of_other_programs_nor_on_how_many_there_are_bitwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    channels = 300
    x, weight = torch.randn(36, channels).bfloat16(), torch.randn(channels, 4).bfloat16()
    pool = torch.randn(5, 3 + DRAFTS, channels).bfloat16().transpose(1, 2)
    slots, accepted = distinct_slots(2, 5), torch.tensor([2, 4])

    def run(part: slice) -> list[Tensor]:
        inputs, weights, state = x[:, part], weight[part], pool.clone()[:, part]
        y = causal_conv1d_prefill(inputs, weights, state, slots, start_offsets([33, 3]), torch.tensor([True, False]))
        verified = causal_conv1d_verify(inputs[:5], weights, state, slots, start_offsets([1, 4]), accepted)
        return [y, verified, causal_conv1d_decode(inputs[:2], weights, state, slots), state.transpose(1, 2)]

    whole = run(slice(channels))
    monkeypatch.setattr(triton_conv, "FEW_PROGRAMS", 0)
    for part in (slice(channels), slice(3, 40), slice(100, 300)):
        for alone, together in zip(run(part), whole, strict=True):
            assert same_bits(alone, together[..., part])


@pytest.mark.parametrize(("run", "lengths"), [(prefill, [1, 33, 140, 3]), (decode, [1] * 4), (verify, [1, 4, 2, 3])])
def test_a_sequence_does_not_depend_on_the_batch_or_the_order_of_programs(
    run: Callable[..., list[tuple[Tensor, Tensor]]], lengths: list[int]
) -> None:
    weight, pool = make_weight(4, torch.bfloat16), make_pool(9, 4, torch.bfloat16, "channels last", drafts=DRAFTS)
    xs = [torch.randn(length, CHANNELS).bfloat16() for length in lengths]
    histories = [random_history(4, torch.bfloat16, torch.bfloat16) for _ in xs]
    order = torch.randperm(4).tolist()
    together = run(weight, pool, xs, histories)
    with shuffled_programs(seed=1):
        shuffled = run(weight, pool, [xs[n] for n in order], [histories[n] for n in order])
    for n, other in zip(order, shuffled, strict=True):
        of_any_backend.assert_same(other, together[n])
        of_any_backend.assert_same(run(weight, pool, [xs[n]], [histories[n]])[0], together[n])


@pytest.mark.parametrize("width", [1, 6])
def test_kernels_of_other_widths_agree_with_float64(width: int) -> None:
    of_any_backend.test_prefill_agrees_with_float64("triton", width, torch.float32, torch.float32, "channels first")
    of_any_backend.test_verify_agrees_with_float64("triton", width, torch.float32, torch.float32, "channels last")


def test_a_slice_of_a_projection_and_a_strided_weight_are_read_where_they_lie() -> None:
    wide, weights = torch.randn(40, CHANNELS + 5), torch.randn(4, CHANNELS)
    x, slots, offsets = wide[:, 2:-3], distinct_slots(2, 3), start_offsets([7, 33])
    pools, known = [make_pool(3, 4, torch.float32, "channels first") for _ in range(2)], torch.tensor([False, False])
    ours = causal_conv1d_prefill(x, weights.t(), pools[0], slots, offsets, known)
    plain = causal_conv1d_prefill(x.contiguous(), weights.t().contiguous(), pools[1], slots, offsets, known)
    assert same_bits(ours, plain)
    assert same_bits(*pools)


def test_counts_that_no_host_checks_are_clamped_and_write_only_where_there_is_room() -> None:
    weight, pool = make_weight(4), make_pool(9, 4, torch.float32, "channels last", drafts=1)
    slots, offsets, x = distinct_slots(2, 9), start_offsets([3, 12]), torch.randn(15, CHANNELS)
    pool[slots] = past_inputs(2, 5, torch.float32, torch.float32)
    before, bytes_before = pool.clone(), memory(pool).clone()
    y = TritonCausalConv1d().verify(x, weight, pool, slots, offsets, torch.tensor([-7, 2**40]))
    for n, (offset, part) in enumerate(((0, slice(0, 3)), (1, slice(3, 15)))):
        inputs = torch.cat([before[slots[n], :, offset : offset + 3].t(), x[part]])
        windows = inputs.double().unfold(0, 4, 1)
        assert_close(y[part], torch.nn.functional.silu((windows * weight.double()).sum(-1)), roundings(4))
        assert same_bits(pool[slots[n]], inputs[1:5].t())
    assert only_written(pool, before, bytes_before, slots)


@pytest.mark.parametrize(
    ("shape", "dtype", "pool_dtype", "channels_last"),
    [((3, 5, 12), torch.bfloat16, torch.bfloat16, True), ((2, 24, 136), torch.float32, torch.bfloat16, False)],
)
def test_a_prefill_of_inputs_grouped_by_key_head_has_the_bits_of_one_of_channels(
    shape: of_grouped_inputs.Shape, dtype: torch.dtype, pool_dtype: torch.dtype, channels_last: bool
) -> None:
    inputs, pool = of_grouped_inputs.inputs_and_pool(shape, 137, dtype, pool_dtype, channels_last)
    where = torch.tensor([4, 0, -1]), start_offsets([133, 2, 2]), torch.tensor([True, False, True])
    snapshots = torch.tensor([3, -1, 1]), torch.tensor([128, 0, 1])
    of_grouped_inputs.assert_same_bits(inputs, shape[1], pool, *where, *snapshots)
