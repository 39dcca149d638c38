"""Prefill in segments beside each other, interpreted: numbers and the promises it keeps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qnext_kernels import OPERATIONS, force_backend, gated_delta_rule_prefill
from qnext_kernels.dispatch import Call, deterministic, reason_to_decline
from qnext_kernels.gated_delta_rule import CHUNK_SIZE, triton_segments
from qnext_kernels.gated_delta_rule.context_parallel import TritonContextParallel
from tests.kernels import test_gated_delta_rule as numbers
from tests.kernels import test_gated_delta_rule_bitwise as promises
from tests.kernels.delta_rule_runs import (
    SHAPES,
    Gates,
    Result,
    Run,
    Shape,
    prefill,
    random_gates,
    random_runs,
    random_state,
    random_tokens,
)
from tests.kernels.kernel_inputs import assert_close, nan_pool, same_bits, start_offsets
from tests.kernels.triton import test_gated_delta_rule as serial

NAME = "triton_context_parallel"
interpreted = pytest.mark.usefixtures("interpreter", "context_parallel")
two_chunks = pytest.mark.usefixtures("segments_of_two_chunks")
one_chunk = pytest.mark.usefixtures("segments_of_a_chunk")


@pytest.fixture
def context_parallel(interpreter: None) -> Iterator[None]:
    with force_backend(NAME):
        yield


@pytest.fixture
def segments_of_two_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_segments, "SEGMENT", 2)


@pytest.fixture
def segments_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_segments, "SEGMENT", 1)


@interpreted
@two_chunks
@pytest.mark.parametrize(("shape", "dtype", "state_dtype"), serial.CASES[:3])
def test_prefill_agrees_with_float64(
    shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serial, "LENGTHS", (0, 1, 65, 132, 260))
    serial.test_prefill_agrees_with_float64(shape, dtype, state_dtype)


@interpreted
def test_segments_of_their_own_length_agree_with_float64() -> None:
    shape, segment = Shape(1, 1, 16, 16), triton_segments.SEGMENT * CHUNK_SIZE
    gates = Gates(torch.tensor([-6.0]), torch.zeros(1))
    (run,) = random_runs(shape, [2 * segment + 70], torch.bfloat16, torch.float32)
    ours, truth = prefill([run], gates, torch.float32)[0], serial.by_reference(run, gates)
    expected = serial.roundings(shape, len(run.tokens.v), torch.bfloat16, torch.float32)
    assert_close(ours.out, truth.out, expected)
    assert_close(ours.state, truth.state, expected)


@interpreted
@one_chunk
def test_what_a_head_remembers_is_not_rounded_between_segments() -> None:
    shape, length = SHAPES[0], 12 * CHUNK_SIZE
    tokens, gates = random_tokens(shape, length, torch.bfloat16), Gates(torch.full((2,), -8.0), torch.zeros(2))
    tokens.b.fill_(-100.0)
    run = Run(tokens, random_state(shape, torch.float32))
    (ours,) = prefill([run], gates, torch.float32)
    assert_close(ours.state, serial.by_reference(run, gates).state, {torch.float32: 8 * length})


@interpreted
@one_chunk
def test_decays_and_keys_of_any_size_cost_no_accuracy() -> None:
    serial.test_a_token_that_forgets_everything_costs_the_others_no_accuracy()
    serial.test_equal_keys_written_in_full_strength_stay_accurate()
    serial.test_products_of_a_part_of_the_keys_at_a_time_agree_with_float64()
    serial.test_keys_of_any_size_are_normalised_without_overflow(torch.float16)
    numbers.test_zero_keys_and_strong_decays_stay_finite(NAME)


@interpreted
@two_chunks
def test_a_sequence_does_not_depend_on_the_batch_or_the_order_of_programs() -> None:
    serial.test_a_sequence_does_not_depend_on_the_batch_or_the_order_of_programs(prefill, [1, 128, 132, 257])


@interpreted
@two_chunks
@serial.two_cases
def test_prefill_split_at_segments_equals_unsplit(shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    gates, segment = random_gates(shape), triton_segments.SEGMENT * CHUNK_SIZE
    for length, with_state in ((133, False), (256, True)):
        state = random_state(shape, state_dtype) if with_state else None
        tokens = random_tokens(shape, length, dtype)
        (whole,) = prefill([Run(tokens, state)], gates, state_dtype)
        for cut in range(segment, length, segment):
            (head,) = prefill([Run(tokens.rows(slice(cut)), state)], gates, state_dtype)
            (tail,) = prefill([Run(tokens.rows(slice(cut, None)), head.state)], gates, state_dtype)
            promises.assert_same(Result(torch.cat([head.out, tail.out]), tail.state), whole)


@interpreted
@two_chunks
def test_a_snapshot_equals_a_prefill_of_its_tokens_and_changes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [(0, 0), (64, 64), (132, 128), (260, 192), (256, 256)]
    monkeypatch.setattr(promises, "SNAPSHOTS", lengths)
    promises.test_a_snapshot_equals_a_prefill_of_its_tokens_and_changes_nothing_else(
        NAME, Shape(1, 1, 16, 16), torch.bfloat16, torch.bfloat16
    )


@interpreted
@serial.two_cases
def test_prefill_of_few_tokens_equals_decode_and_verify(
    shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    promises.test_prefill_of_one_token_equals_decode(NAME, shape, dtype, state_dtype)
    promises.test_prefill_of_few_tokens_equals_verify(NAME, shape, dtype, state_dtype)


@interpreted
@one_chunk
def test_views_into_wider_rows_are_read_where_they_lie() -> None:
    serial.test_views_into_wider_rows_are_read_where_they_lie(prefill)


@interpreted
def test_an_empty_batch_is_served() -> None:
    numbers.test_an_empty_batch_is_served(NAME)


@interpreted
@one_chunk
def test_a_skipped_sequence_of_many_segments_has_zero_outputs_beside_another() -> None:
    shape, lengths = SHAPES[0], [200, 200]
    tokens, gates = random_tokens(shape, sum(lengths), torch.float32), random_gates(shape)
    pool, known, offsets = nan_pool(1, shape.state, torch.float32), torch.tensor([True, False]), start_offsets(lengths)
    out = gated_delta_rule_prefill(*tokens, *gates, pool, torch.tensor([-1, 0]), offsets, known)
    alone = prefill([Run(tokens.rows(slice(200, None)), None)], gates, torch.float32)[0]
    assert not out[:200].any()
    assert same_bits(out[200:], alone.out)
    assert same_bits(pool[0], alone.state)


def test_it_stands_behind_the_serial_walk_and_serves_neither_large_keys_nor_the_deterministic_mode() -> None:
    names = [backend.name for backend in OPERATIONS["gated_delta_rule"].backends]
    assert names.index(NAME) == names.index("triton") + 1
    backend, device = TritonContextParallel(), torch.device("cuda")
    shapes = {"prefill": (2, 4, 256, 128), "decode": (2, 4, 256, 128)}
    reasons = {
        method: backend.supports_call(device, torch.bfloat16, Call(method, 8192, shape))
        for method, shape in shapes.items()
    }
    assert reasons == {"prefill": "needs a key dimension of at most 128, got 256", "decode": None}
    assert backend.supports_call(device, torch.bfloat16, Call("prefill", 1, (2, 4, 128, 256))) is None
    with deterministic():
        reason = reason_to_decline(backend, device, torch.bfloat16)
    assert reason == "is not batch invariant, as the deterministic mode requires"
