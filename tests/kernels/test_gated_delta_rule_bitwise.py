"""The promises of the gated delta rule that hold to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qnext_kernels import (
    force_backend,
    gated_delta_rule_decode,
    gated_delta_rule_prefill,
    gated_delta_rule_verify,
)
from qnext_kernels.gated_delta_rule import CHUNK_SIZE
from tests.kernels.delta_rule_runs import (
    COLUMNS,
    MODEL_SHAPE,
    SHAPES,
    Result,
    Run,
    Shape,
    decode,
    join,
    place,
    prefill,
    random_gates,
    random_runs,
    random_state,
    random_tokens,
    repeated_decode,
    verify,
)
from tests.kernels.kernel_inputs import (
    DTYPES,
    LENGTHS,
    NATIVE_BACKENDS,
    distinct_slots,
    memory,
    nan_pool,
    nan_steps,
    only_written,
    same_bits,
    start_offsets,
)

ALL_SHAPES = [*SHAPES, MODEL_SHAPE]
SNAPSHOTS = [(0, 0), (1, 0), (63, 0), (64, 0), (64, 64), (65, 64), (197, 64), (197, 128), (197, 192)]
"""Lengths of sequences, and behind how many of their tokens to take a snapshot."""


def assert_same(actual: Result, expected: Result) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_verify_equals_repeated_decode(
    backend: str, shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    gates = random_gates(shape)
    runs = random_runs(shape, [1, 2, 3, 4, 4, 3, 2, 1], dtype, state_dtype)
    with force_backend(backend):
        for run, verified in zip(runs, verify(runs, gates, state_dtype), strict=True):
            assert_same(verified, repeated_decode(run, gates, state_dtype))


@pytest.mark.parametrize("accepted", [1, 2, 18])
@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_a_long_verify_equals_repeated_decode_and_skips_padded_slots(
    backend: str, state_dtype: torch.dtype, accepted: int
) -> None:
    length, shape = 18, MODEL_SHAPE
    gates, (run,) = random_gates(shape), random_runs(shape, [length], torch.bfloat16, state_dtype)
    pool, slots = place([run], state_dtype, columns=length, accepted=torch.tensor([accepted]))
    slots[0, [2, 15, 16]] = -1
    with force_backend(backend):
        out = gated_delta_rule_verify(
            *run.tokens, *gates, pool, slots, start_offsets([length]), torch.tensor([accepted])
        )
        for t, slot in enumerate(slots[0].tolist()):
            expected = repeated_decode(Run(run.tokens.rows(slice(t + 1)), run.state), gates, state_dtype)
            assert same_bits(out[: t + 1], expected.out)
            assert slot < 0 or same_bits(pool[slot], expected.state)


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_tokens_that_were_not_accepted_leave_no_trace(backend: str, shape: Shape, state_dtype: torch.dtype) -> None:
    gates, count = random_gates(shape), 5
    pool = nan_pool(count * COLUMNS + 3, shape.state, state_dtype)
    slots = distinct_slots(count * COLUMNS, len(pool)).view(count, COLUMNS)
    accepted = torch.ones(count, dtype=torch.int64)
    rows = torch.arange(count)
    states = [random_state(shape, state_dtype) for _ in rows]
    pool[slots[:, 0]] = torch.stack(states)
    with force_backend(backend):
        for _ in range(5):
            lengths = torch.randint(1, COLUMNS + 1, (count,))
            offsets, tokens = start_offsets(lengths.tolist()), random_tokens(shape, int(lengths.sum()), torch.bfloat16)
            out = gated_delta_rule_verify(*tokens, *gates, pool, slots, offsets, accepted)
            accepted = (torch.rand(count) * lengths).long() + 1
            for n, start in enumerate(offsets[:-1].tolist()):
                taken = slice(start, start + int(accepted[n]))
                expected, states[n] = repeated_decode(Run(tokens.rows(taken), states[n]), gates, state_dtype)
                assert same_bits(out[taken], expected)
        tokens = random_tokens(shape, count, torch.bfloat16)
        resumed = slots[rows, accepted - 1]
        out = gated_delta_rule_decode(*tokens, *gates, pool, resumed)
        for n in range(count):
            one = Run(tokens.rows(slice(n, n + 1)), states[n])
            assert_same(Result(out[n : n + 1], pool[resumed[n]]), repeated_decode(one, gates, state_dtype))


Call = Callable[..., list[Result]]


def assert_batch_is_invisible(call: Call, shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    gates = random_gates(shape)
    longest = {prefill: max(LENGTHS), decode: 1, verify: COLUMNS}[call]
    lengths = [length for length in LENGTHS * 25 if 0 < length <= longest]
    runs = random_runs(shape, lengths[:25], dtype, state_dtype)
    order = torch.randperm(25).tolist()
    together = call(runs, gates, state_dtype)
    shuffled = call([runs[n] for n in order], gates, state_dtype)
    for n, other in zip(order, shuffled, strict=True):
        assert_same(other, together[n])
        assert_same(call([runs[n]], gates, state_dtype)[0], together[n])


@pytest.mark.parametrize("call", [prefill, decode, verify])
@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_a_sequence_does_not_depend_on_the_batch(
    backend: str, shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype, call: Call
) -> None:
    with force_backend(backend):
        assert_batch_is_invisible(call, shape, dtype, state_dtype)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("call", [prefill, decode, verify])
def test_a_sequence_does_not_depend_on_how_threads_share_the_batch(call: Call) -> None:
    assert_batch_is_invisible(call, MODEL_SHAPE, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_prefill_split_at_chunks_equals_unsplit(
    backend: str, shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype, with_state: bool
) -> None:
    gates = random_gates(shape)
    for length in (65, 68, 69, 128, 133, 200):
        tokens = random_tokens(shape, length, dtype)
        state = random_state(shape, state_dtype) if with_state else None
        with force_backend(backend):
            (whole,) = prefill([Run(tokens, state)], gates, state_dtype)
            for cut in range(CHUNK_SIZE, length, CHUNK_SIZE):
                (head,) = prefill([Run(tokens.rows(slice(cut)), state)], gates, state_dtype)
                (tail,) = prefill([Run(tokens.rows(slice(cut, None)), head.state)], gates, state_dtype)
                assert_same(Result(torch.cat([head.out, tail.out]), tail.state), whole)


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_prefill_of_one_token_equals_decode(
    backend: str, shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    gates, runs = random_gates(shape), random_runs(shape, [1] * 5, dtype, state_dtype)
    with force_backend(backend):
        for ours, decoded in zip(prefill(runs, gates, state_dtype), decode(runs, gates, state_dtype), strict=True):
            assert_same(ours, decoded)


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_prefill_of_few_tokens_equals_verify(
    backend: str, shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    gates, runs = random_gates(shape), random_runs(shape, [1, 2, 3, 4], dtype, state_dtype)
    with force_backend(backend):
        for ours, verified in zip(prefill(runs, gates, state_dtype), verify(runs, gates, state_dtype), strict=True):
            assert_same(ours, verified)


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_a_snapshot_equals_a_prefill_of_its_tokens_and_changes_nothing_else(
    backend: str, shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    # Every sequence with and without an initial state.
    lengths, cuts = (list(values) for values in zip(*SNAPSHOTS, *SNAPSHOTS, strict=True))
    gates, runs = random_gates(shape), random_runs(shape, lengths, dtype, state_dtype)
    runs[len(SNAPSHOTS) :] = [Run(run.tokens, None) for run in runs[len(SNAPSHOTS) :]]
    pool, slots = place(runs, state_dtype, columns=2)
    slots, snapshot_slots = slots.unbind(1)
    slots[5] = snapshot_slots[3] = snapshot_slots[-2] = -1
    before, bytes_before = pool.clone(), memory(pool).clone()
    known = torch.tensor([run.state is not None for run in runs])
    snapshot_lengths = torch.tensor(cuts)
    snapshot_lengths[-2] = 999
    with force_backend(backend):
        whole = prefill(runs, gates, state_dtype)
        heads = prefill(
            [Run(r.tokens.rows(slice(c)), r.state) for r, c in zip(runs, cuts, strict=True)], gates, state_dtype
        )
        out = gated_delta_rule_prefill(
            *join(runs), *gates, pool, slots, start_offsets(lengths), known, snapshot_slots, snapshot_lengths
        )
    taken = (slots >= 0) & (snapshot_slots >= 0)
    for n, ours in enumerate(out.split(lengths)):
        if slots[n] < 0:
            assert not ours.any()
            continue
        assert_same(Result(ours, pool[slots[n]]), whole[n])
        if taken[n]:
            state = heads[n].state if cuts[n] or known[n] else torch.zeros(shape.state, dtype=state_dtype)
            assert same_bits(pool[snapshot_slots[n]], state)
    assert only_written(pool, before, bytes_before, torch.cat([slots[slots >= 0], snapshot_slots[taken]]))


@pytest.mark.parametrize(("columns", "steps_first"), [(1, False), (COLUMNS + 2, True)])
@pytest.mark.parametrize("step_dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_verify_with_a_step_pool_equals_repeated_decode_and_only_reads_the_state(
    backend: str,
    shape: Shape,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    step_dtype: torch.dtype,
    columns: int,
    steps_first: bool,
) -> None:
    lengths = [1, 2, 3, 4, 0, 3, 2, 1]
    gates, runs = random_gates(shape), random_runs(shape, lengths, dtype, state_dtype)
    accepted, step_rows = torch.randint(1, columns + 1, (8,)), distinct_slots(8, 10)
    pool, slots = place(runs, state_dtype, columns=columns, accepted=accepted)
    slots[2, accepted[2] - 1], step_rows[5] = -1, -1
    before = memory(pool).clone()
    steps, expected = (nan_steps(10, COLUMNS, shape.state, step_dtype, steps_first=steps_first) for _ in range(2))
    where = (slots, start_offsets(lengths), accepted)
    # The state that a sequence starts from is not rounded to the dtype of the step pool.
    first = state_dtype if state_dtype == step_dtype else torch.float32
    with force_backend(backend):
        out = gated_delta_rule_verify(*join(runs), *gates, pool, *where, steps, step_rows)
        for n, ours in enumerate(out.split(lengths)):
            if n == 2:
                assert not ours.any()
                continue
            state = runs[n].state
            for t in range(lengths[n]):
                one = Run(runs[n].tokens.rows(slice(t, t + 1)), state)
                ((decoded, state),) = decode([one], gates, step_dtype if t else first)
                state = state.to(step_dtype)
                assert same_bits(ours[t : t + 1], decoded)
                if step_rows[n] >= 0:
                    expected[step_rows[n], t] = state
    assert torch.equal(memory(steps), memory(expected))
    assert torch.equal(memory(pool), before)


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_verify_with_a_step_pool_equals_verify_in_place(
    backend: str, shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    lengths = [1, 2, 3, 4, 4, 3, 2, 1]
    gates, runs = random_gates(shape), random_runs(shape, lengths, dtype, state_dtype)
    accepted, step_rows = torch.randint(1, COLUMNS + 1, (8,)), distinct_slots(8, 10)
    pool, slots = place(runs, state_dtype, columns=COLUMNS, accepted=accepted)
    steps = nan_steps(10, COLUMNS, shape.state, state_dtype, steps_first=True)
    where = (slots, start_offsets(lengths), accepted)
    with force_backend(backend):
        out = gated_delta_rule_verify(*join(runs), *gates, pool, *where, steps, step_rows)
        in_place = gated_delta_rule_verify(*join(runs), *gates, pool, *where)
    assert same_bits(out, in_place)
    for row, step_row, length in zip(slots, step_rows, lengths, strict=True):
        assert same_bits(steps[step_row, :length], pool[row[:length]])
