"""The gated delta rule in Triton, interpreted: numbers, promises, and no lane out of bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qnext_kernels import force_backend, gated_delta_rule_decode, gated_delta_rule_prefill, gated_delta_rule_verify
from qnext_kernels.gated_delta_rule import CHUNK_SIZE
from qnext_kernels.gated_delta_rule.cpu import RECURRENT_TOKENS
from qnext_kernels.gated_delta_rule.triton import TritonGatedDeltaRule
from tests.kernels import test_gated_delta_rule as numbers
from tests.kernels import test_gated_delta_rule_bitwise as promises
from tests.kernels.delta_rule_runs import (
    COLUMNS,
    SHAPES,
    Gates,
    Result,
    Run,
    Shape,
    Tokens,
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
    assert_close,
    distinct_slots,
    memory,
    nan_pool,
    only_written,
    same_bits,
    start_offsets,
)
from tests.kernels.triton.interpreter import shuffled_programs

pytestmark = pytest.mark.usefixtures("interpreter")

LENGTHS = (0, 1, 4, 63, 64, 65, 128)
HALF = (torch.bfloat16, torch.float16)

TILED = Shape(1, 2, 16, 64)
"""A prefill in bfloat16 loads whole chunks of it by tensor descriptors where the GPU has them."""

CASES = [
    (SHAPES[0], torch.float32, torch.float32),
    (SHAPES[1], torch.bfloat16, torch.float32),
    (SHAPES[2], torch.float32, torch.bfloat16),
    (TILED, torch.bfloat16, torch.bfloat16),
    (SHAPES[1], torch.float16, torch.float32),
]
cases = pytest.mark.parametrize(("shape", "dtype", "state_dtype"), CASES)
two_cases = pytest.mark.parametrize(("shape", "dtype", "state_dtype"), [CASES[1], (SHAPES[0], *CASES[2][1:])])


def roundings(shape: Shape, tokens: int, dtype: torch.dtype, state_dtype: torch.dtype) -> dict[torch.dtype, int]:
    """Of a prefill: in float32 eight of the state a token and a sum over keys, in the pool one a chunk or token."""
    counts = {torch.float32: 8 * tokens + shape.key_dim}
    if state_dtype != torch.float32:
        counts[state_dtype] = tokens // CHUNK_SIZE + RECURRENT_TOKENS
    if dtype in HALF:
        # Factors of products are rounded once. The terms of a sum err independently: it errs as one of its size.
        counts[dtype] = counts.get(dtype, 0) + 1
    return counts


@cases
def test_prefill_agrees_with_float64(shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    # Every length with and without an initial state; the last two are padding.
    lengths = [*LENGTHS, *LENGTHS, 2, 65]
    tokens, gates = random_tokens(shape, sum(lengths), dtype), random_gates(shape)
    pool = nan_pool(30, shape.state, state_dtype)
    slots, known = distinct_slots(len(lengths), 30), torch.arange(len(lengths)) < len(LENGTHS)
    slots[-2:] = -1
    for slot in slots[(slots >= 0) & known]:
        pool[slot] = random_state(shape, state_dtype)
    before, bytes_before = pool.clone(), memory(pool).clone()
    truth_pool, offsets = pool.double(), start_offsets(lengths)
    with force_backend("reference"):
        truth = gated_delta_rule_prefill(*tokens.double(), *gates, truth_pool, slots, offsets, known)
    out = gated_delta_rule_prefill(*tokens, *gates, pool, slots, offsets, known)
    expected = roundings(shape, max(lengths), dtype, state_dtype)
    written = slots[(slots >= 0) & (offsets.diff() > 0)]
    assert out.dtype == dtype
    assert_close(out, truth, expected)
    assert not out[offsets[-3] :].any()
    assert_close(pool[written], truth_pool[written], expected)
    assert only_written(pool, before, bytes_before, written)


@cases
def test_verify_agrees_with_float64(shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    lengths = [0, 1, 2, 3, 4, 4, 4]
    tokens, gates = random_tokens(shape, sum(lengths), dtype), random_gates(shape)
    pool = nan_pool(len(lengths) * COLUMNS + 3, shape.state, state_dtype)
    slots = distinct_slots(len(lengths) * COLUMNS, len(pool)).view(-1, COLUMNS)
    accepted, rows = torch.tensor([1, 2, 3, 4, 1, 2, 4], dtype=torch.int32), torch.arange(len(lengths))
    slots[3] = -1
    slots[4, 0] = -1
    slots[5, 2:] = -1
    initial = slots[rows, accepted - 1]
    for slot in initial[initial >= 0]:
        pool[slot] = random_state(shape, state_dtype)
    before, bytes_before = pool.clone(), memory(pool).clone()
    truth_pool, offsets = pool.double(), start_offsets(lengths, torch.int64)
    with force_backend("reference"):
        truth = gated_delta_rule_verify(*tokens.double(), *gates, truth_pool, slots, offsets, accepted)
    out = gated_delta_rule_verify(*tokens, *gates, pool, slots, offsets, accepted)
    expected = {torch.float32: 8 * COLUMNS + shape.key_dim}
    if state_dtype != torch.float32:
        expected[state_dtype] = COLUMNS
    reached = (torch.arange(COLUMNS) < torch.tensor(lengths)[:, None]) & (initial >= 0)[:, None] & (slots >= 0)
    written = slots[reached]
    assert out.dtype == dtype
    assert_close(out, truth, expected)
    assert not out[offsets[3] : offsets[5]].any()
    assert_close(pool[written], truth_pool[written], expected)
    assert only_written(pool, before, bytes_before, written)


def test_padding_behind_the_last_sequence_of_a_verify_has_zero_outputs() -> None:
    # As in a CUDA graph for more sequences than there are; only a GPU's offsets may end before the last token.
    shape, lengths, padding = SHAPES[0], [2, 1, 0, 0], 3
    tokens, gates = random_tokens(shape, sum(lengths) + padding, torch.float32), random_gates(shape)
    pool = random_state(shape, torch.float32).repeat(2 * len(lengths), 1, 1, 1)
    slots, accepted = torch.arange(len(pool)).view(-1, 2), torch.ones(len(lengths), dtype=torch.int32)
    slots[2:] = -1
    out = TritonGatedDeltaRule().verify(*tokens, *gates, pool, slots, start_offsets(lengths), accepted)
    assert out[: sum(lengths)].any(dim=2).all()
    assert not out[sum(lengths) :].any()


@cases
def test_decode_agrees_with_float64(shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    tokens, gates = random_tokens(shape, 6, dtype), random_gates(shape)
    pool, slots = nan_pool(9, shape.state, state_dtype), distinct_slots(6, 9).long()
    slots[3:5] = -1
    live = slots[slots >= 0]
    for slot in live:
        pool[slot] = random_state(shape, state_dtype)
    before, bytes_before, truth_pool = pool.clone(), memory(pool).clone(), pool.double()
    with force_backend("reference"):
        truth = gated_delta_rule_decode(*tokens.double(), *gates, truth_pool, slots)
    out = gated_delta_rule_decode(*tokens, *gates, pool, slots)
    expected = {torch.float32: 8 + shape.key_dim}
    assert out.dtype == dtype
    assert_close(out, truth, expected)
    assert not out[3:5].any()
    assert_close(pool[live], truth_pool[live], expected)
    assert only_written(pool, before, bytes_before, live)


def by_reference(run: Run, gates: Gates) -> Result:
    truth = Run(run.tokens.double(), None if run.state is None else run.state.double())
    with force_backend("reference"):
        return prefill([truth], gates, torch.float64)[0]


def test_a_token_that_forgets_everything_costs_the_others_no_accuracy() -> None:
    shape, length = SHAPES[0], 150
    tokens = random_tokens(shape, length, torch.float32)
    tokens.a[:, 0] = -3.0
    tokens.a[::17, 0] = 1e4
    tokens.a[:, 1] = 1e4
    gates = Gates(torch.zeros(2), torch.zeros(2))
    run = Run(tokens, random_state(shape, torch.float32))
    ours, truth = prefill([run], gates, torch.float32)[0], by_reference(run, gates)
    expected = roundings(shape, length, torch.float32, torch.float32)
    assert_close(ours.out, truth.out, expected)
    assert_close(ours.state, truth.state, expected)


def test_zero_keys_and_strong_decays_stay_finite() -> None:
    numbers.test_zero_keys_and_strong_decays_stay_finite("triton")


def test_equal_keys_written_in_full_strength_stay_accurate() -> None:
    """Powers of the triangular system would reach 10¹⁸ here, while its inverse stays below 1."""
    shape, length = SHAPES[1], 128
    tokens = random_tokens(shape, length, torch.float32)
    tokens.k[:] = tokens.k[:1]
    assert_accurate_in_full_strength(shape, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_keys_that_are_nearly_equal_or_opposite_stay_accurate_in_full_strength(dtype: torch.dtype) -> None:
    """The inverse has entries of every size up to 1 then, most of them differences of larger products."""
    shape, length = SHAPES[1], 64
    tokens = random_tokens(shape, length, torch.float32)
    sign = torch.where(torch.rand(length) < 0.5, -1.0, 1.0)[:, None, None]
    tokens.k[:] = sign * (tokens.k[:1] + 0.1 * tokens.k)
    assert_accurate_in_full_strength(shape, Tokens(*(x.to(dtype) for x in tokens)))


def assert_accurate_in_full_strength(shape: Shape, tokens: Tokens) -> None:
    """Nothing is forgotten, and what a key reads is replaced."""
    length, dtype = len(tokens.v), tokens.v.dtype
    tokens.a.fill_(-30.0)
    tokens.b.fill_(30.0)
    gates, run = random_gates(shape), Run(tokens, random_state(shape, torch.float32))
    ours, truth = prefill([run], gates, torch.float32)[0], by_reference(run, gates)
    expected = roundings(shape, length, dtype, torch.float32)
    assert_close(ours.out, truth.out, expected)
    assert_close(ours.state, truth.state, expected)


def test_rows_that_no_tensor_descriptor_can_have_agree_with_float64() -> None:
    length = 150
    gates, run = random_gates(TILED), random_runs(TILED, [length], torch.bfloat16, torch.float32)[0]
    wide = [torch.cat([x.flatten(1), torch.full((length, 3), torch.nan, dtype=x.dtype)], dim=1) for x in run.tokens[:3]]
    rows = (x[:, :-3].unflatten(1, y.shape[1:]) for x, y in zip(wide, run.tokens, strict=False))
    ours, truth = (
        prefill([Run(Tokens(*rows, *run.tokens[3:]), run.state)], gates, torch.float32)[0],
        by_reference(run, gates),
    )
    expected = roundings(TILED, length, torch.bfloat16, torch.float32)
    assert_close(ours.out, truth.out, expected)
    assert_close(ours.state, truth.state, expected)


def test_products_of_a_part_of_the_keys_at_a_time_agree_with_float64() -> None:
    shape, length = Shape(1, 2, 72, 16), 150
    gates, run = random_gates(shape), random_runs(shape, [length], torch.bfloat16, torch.float32)[0]
    ours, truth = prefill([run], gates, torch.float32)[0], by_reference(run, gates)
    expected = roundings(shape, length, torch.bfloat16, torch.float32)
    assert_close(ours.out, truth.out, expected)
    assert_close(ours.state, truth.state, expected)


@pytest.mark.parametrize("dtype", HALF)
def test_keys_of_any_size_are_normalised_without_overflow(dtype: torch.dtype) -> None:
    shape, length = SHAPES[1], 100
    tokens, gates = random_tokens(shape, length, dtype), random_gates(shape)
    for rows, size in ((slice(0, 50), 1e3), (slice(50, None), 1e-3)):
        tokens.q[rows] *= size
        tokens.k[rows] *= size
    run = Run(tokens, random_state(shape, torch.float32))
    ours, truth = prefill([run], gates, torch.float32)[0], by_reference(run, gates)
    expected = roundings(shape, length, dtype, torch.float32)
    assert_close(ours.out, truth.out, expected)
    assert_close(ours.state, truth.state, expected)


@two_cases
def test_verify_equals_repeated_decode(shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    promises.test_verify_equals_repeated_decode("triton", shape, dtype, state_dtype)


def test_tokens_that_were_not_accepted_leave_no_trace() -> None:
    promises.test_tokens_that_were_not_accepted_leave_no_trace("triton", Shape(1, 1, 16, 8), torch.bfloat16)


@pytest.mark.parametrize(
    ("state_dtype", "step_dtype", "columns", "steps_first"),
    [(torch.float32, torch.bfloat16, 1, False), (torch.bfloat16, torch.bfloat16, COLUMNS + 2, True)],
)
def test_verify_with_a_step_pool_equals_repeated_decode_and_only_reads_the_state(
    state_dtype: torch.dtype, step_dtype: torch.dtype, columns: int, steps_first: bool
) -> None:
    promises.test_verify_with_a_step_pool_equals_repeated_decode_and_only_reads_the_state(
        "triton", Shape(1, 2, 20, 12), torch.bfloat16, state_dtype, step_dtype, columns, steps_first
    )


@pytest.mark.parametrize(
    ("call", "lengths"), [(decode, [1] * 4), (verify, [1, 2, 4, 3]), (prefill, [1, 64, 68, 3, 130, 65])]
)
def test_a_sequence_does_not_depend_on_the_batch_or_the_order_of_programs(
    call: Callable[..., list[Result]], lengths: list[int]
) -> None:
    shape, state_dtype = SHAPES[0], torch.bfloat16
    gates, runs = random_gates(shape), random_runs(shape, lengths, torch.bfloat16, state_dtype)
    order = torch.randperm(len(runs)).tolist()
    together = call(runs, gates, state_dtype)
    with shuffled_programs(seed=1):
        shuffled = call([runs[n] for n in order], gates, state_dtype)
    for n, other in zip(order, shuffled, strict=True):
        promises.assert_same(other, together[n])
        promises.assert_same(call([runs[n]], gates, state_dtype)[0], together[n])


@two_cases
def test_prefill_of_few_tokens_equals_decode_and_verify(
    shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    promises.test_prefill_of_one_token_equals_decode("triton", shape, dtype, state_dtype)
    promises.test_prefill_of_few_tokens_equals_verify("triton", shape, dtype, state_dtype)


@two_cases
def test_prefill_split_at_chunks_equals_unsplit(shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    gates = random_gates(shape)
    for length, with_state in ((65, False), (69, True), (128, False), (196, True)):
        state = random_state(shape, state_dtype) if with_state else None
        tokens = random_tokens(shape, length, dtype)
        (whole,) = prefill([Run(tokens, state)], gates, state_dtype)
        for cut in range(CHUNK_SIZE, length, CHUNK_SIZE):
            (head,) = prefill([Run(tokens.rows(slice(cut)), state)], gates, state_dtype)
            (tail,) = prefill([Run(tokens.rows(slice(cut, None)), head.state)], gates, state_dtype)
            promises.assert_same(Result(torch.cat([head.out, tail.out]), tail.state), whole)


def test_a_snapshot_equals_a_prefill_of_its_tokens_and_changes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "SNAPSHOTS", [(0, 0), (1, 0), (64, 64), (65, 64), (132, 128)])
    promises.test_a_snapshot_equals_a_prefill_of_its_tokens_and_changes_nothing_else(
        "triton", Shape(1, 2, 16, 16), torch.bfloat16, torch.bfloat16
    )


def interleaved(tokens: Tokens) -> Tokens:
    """The same tokens as views into one tensor, as a convolution leaves them, from an address of any alignment."""
    count = len(tokens.v)
    wide = torch.cat([torch.full((count, 1), torch.nan), *(x.flatten(1) for x in tokens)], dim=1)
    parts = wide[:, 1:].split([x[0].numel() for x in tokens], dim=1)
    return Tokens(*(part.unflatten(1, x.shape[1:]) for part, x in zip(parts, tokens, strict=True)))


@pytest.mark.parametrize("call", [prefill, decode, verify])
def test_views_into_wider_rows_are_read_where_they_lie(call: Callable[..., list[Result]]) -> None:
    shape = SHAPES[1]
    gates = random_gates(shape)
    length = {prefill: 70, decode: 1, verify: 4}[call]
    run = Run(random_tokens(shape, length, torch.float32), random_state(shape, torch.float32))
    view = Run(interleaved(run.tokens), run.state)
    promises.assert_same(call([view], gates, torch.float32)[0], call([run], gates, torch.float32)[0])


def test_counts_that_no_host_checks_are_clamped_and_write_only_where_there_is_room() -> None:
    shape = SHAPES[1]
    gates, runs = random_gates(shape), random_runs(shape, [3, 3], torch.float32, torch.float32)
    expected = [repeated_decode(run, gates, torch.float32) for run in runs]
    second = [repeated_decode(Run(run.tokens.rows(slice(2)), run.state), gates, torch.float32).state for run in runs]
    pool, slots = place(runs, torch.float32, columns=2, accepted=torch.tensor([1, 2]))
    before, bytes_before = pool.clone(), memory(pool).clone()
    out = TritonGatedDeltaRule().verify(
        *join(runs), *gates, pool, slots, start_offsets([3, 3]), torch.tensor([-7, 2**40])
    )
    for ours, theirs, state, row in zip(out.split([3, 3]), expected, second, slots, strict=True):
        assert same_bits(ours, theirs.out)
        assert same_bits(pool[row[1]], state)
    assert only_written(pool, before, bytes_before, slots.flatten())


def test_steps_of_a_pool_may_lie_further_apart_than_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, apart = Shape(1, 1, 4, 4), 1 << 30
    gates = random_gates(shape)
    run = Run(random_tokens(shape, 3, torch.float32), random_state(shape, torch.float32))
    pool, slots = place([run], torch.float32)
    # By steps in memory, of which a system has none behind what is never touched.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    steps = torch.empty(2 * apart + 16, dtype=torch.float16).as_strided((1, 3, *shape.state), (16, apart, 16, 4, 1))
    near = torch.empty(1, 3, *shape.state, dtype=torch.float16)
    batch = *run.tokens, *gates, pool, slots, start_offsets([3]), torch.ones(1, dtype=torch.int32)
    for kept in (steps, near):
        TritonGatedDeltaRule().verify(*batch, (kept, torch.zeros(1, dtype=torch.int32)))
    assert same_bits(steps, near)


def test_a_pool_that_is_not_contiguous_within_a_slot_is_refused_by_name() -> None:
    shape = Shape(2, 1, 16, 16)
    tokens, gates = random_tokens(shape, 1, torch.float32), random_gates(shape)
    slots, offsets = torch.zeros(1, dtype=torch.int32), start_offsets([1])
    pool = torch.zeros(3, *shape.state).transpose(2, 3)
    steps = torch.zeros(2, 4, *shape.state).transpose(3, 4)
    with pytest.raises(ValueError, match=r"^state: expected slots with strides"):
        gated_delta_rule_decode(*tokens, *gates, pool, slots)
    with pytest.raises(ValueError, match=r"^state: expected slots with strides"):
        gated_delta_rule_prefill(*tokens, *gates, pool, slots, offsets, torch.tensor([True]))
    pool = pool.transpose(2, 3)
    with pytest.raises(ValueError, match=r"^step_state: expected slots with strides"):
        gated_delta_rule_verify(*tokens, *gates, pool, slots[:, None], offsets, slots + 1, steps, slots)


def test_an_empty_batch_is_served() -> None:
    numbers.test_an_empty_batch_is_served("triton")
