"""The gated delta rule against float64, against transformers, and against bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from qnext_kernels import (
    force_backend,
    gated_delta_rule_decode,
    gated_delta_rule_prefill,
    gated_delta_rule_verify,
)
from qnext_kernels.gated_delta_rule import CHUNK_SIZE
from tests.kernels.delta_rule_runs import (
    COLUMNS,
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
    verify,
)
from tests.kernels.kernel_inputs import (
    DTYPES,
    LENGTHS,
    NATIVE_BACKENDS,
    Bad,
    assert_close,
    distinct_slots,
    memory,
    nan_pool,
    nan_steps,
    only_written,
    start_offsets,
)


def roundings(shape: Shape, tokens: int, state_dtype: torch.dtype, stored: int) -> dict[torch.dtype, int]:
    """Eight roundings of the state a token, a sum over the key dimension, and ``stored`` stays in the pool."""
    counts = {torch.float32: 8 * tokens + shape.key_dim}
    return counts if state_dtype == torch.float32 else {**counts, state_dtype: stored}


def roundings_of_prefill(counts: dict[torch.dtype, int], backend: str, dtype: torch.dtype) -> dict[torch.dtype, int]:
    """Those of a prefill's outputs: the C++ kernel rounds the state that queries of bfloat16 are multiplied with."""
    if backend != "native" or dtype != torch.bfloat16:
        return counts
    return {**counts, torch.bfloat16: counts.get(torch.bfloat16, 0) + 1}


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_prefill_agrees_with_float64(backend: str, shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    lengths = [*LENGTHS, *LENGTHS, 2, 65]
    tokens, gates = random_tokens(shape, sum(lengths), dtype), random_gates(shape)
    pool = nan_pool(40, shape.state, state_dtype)
    # Every length with and without an initial state; the last two are padding.
    slots, known = distinct_slots(len(lengths), 40), torch.arange(len(lengths)) < len(LENGTHS)
    slots[-2:] = -1
    for slot in slots[(slots >= 0) & known]:
        pool[slot] = random_state(shape, state_dtype)
    before, bytes_before = pool.clone(), memory(pool).clone()
    truth_pool, offsets = pool.double(), start_offsets(lengths)
    with force_backend("reference"):
        truth = gated_delta_rule_prefill(*tokens.double(), *gates, truth_pool, slots, offsets, known)
    with force_backend(backend):
        out = gated_delta_rule_prefill(*tokens, *gates, pool, slots, offsets, known)
    # The reference rounds the state to the pool's dtype after every token; by chunks it is rounded after each of them,
    # and after every token of a short last one.
    stored = max(lengths) if backend == "reference" else max(lengths) // CHUNK_SIZE + 4
    expected = roundings(shape, max(lengths), state_dtype, stored)
    written = slots[(slots >= 0) & (offsets.diff() > 0)]
    assert out.dtype == dtype
    assert_close(out, truth, roundings_of_prefill(expected, backend, dtype))
    assert not out[offsets[-3] :].any()
    assert_close(pool[written], truth_pool[written], expected)
    assert only_written(pool, before, bytes_before, written)


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_verify_agrees_with_float64(backend: str, shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    count = 25
    lengths = [n % (COLUMNS + 1) for n in range(count)]
    tokens, gates = random_tokens(shape, sum(lengths), dtype), random_gates(shape)
    pool = nan_pool(count * COLUMNS + 3, shape.state, state_dtype)
    slots = distinct_slots(count * COLUMNS, len(pool)).view(count, COLUMNS)
    accepted = torch.randint(1, COLUMNS + 1, (count,), dtype=torch.int32)
    rows = torch.arange(count)
    slots[3] = -1
    slots[9, int(accepted[9]) - 1] = -1
    slots[14] = torch.where(torch.arange(COLUMNS) == accepted[14] - 1, slots[14], -1)
    initial = slots[rows, accepted - 1]
    for slot in initial[initial >= 0]:
        pool[slot] = random_state(shape, state_dtype)
    before, bytes_before = pool.clone(), memory(pool).clone()
    truth_pool, offsets = pool.double(), start_offsets(lengths, torch.int64)
    with force_backend("reference"):
        truth = gated_delta_rule_verify(*tokens.double(), *gates, truth_pool, slots, offsets, accepted)
    with force_backend(backend):
        out = gated_delta_rule_verify(*tokens, *gates, pool, slots, offsets, accepted)
    expected = roundings(shape, COLUMNS, state_dtype, stored=COLUMNS)
    reached = (torch.arange(COLUMNS) < torch.tensor(lengths)[:, None]) & (initial >= 0)[:, None] & (slots >= 0)
    written = slots[reached]
    assert out.dtype == dtype
    assert_close(out, truth, expected)
    assert not out[offsets[3] : offsets[4]].any()
    assert not out[offsets[9] : offsets[10]].any()
    assert_close(pool[written], truth_pool[written], expected)
    assert only_written(pool, before, bytes_before, written)


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_decode_agrees_with_float64(backend: str, shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    tokens, gates = random_tokens(shape, 25, dtype), random_gates(shape)
    pool, slots = nan_pool(40, shape.state, state_dtype), distinct_slots(25, 40).long()
    slots[3:5] = -1
    live = slots[slots >= 0]
    for slot in live:
        pool[slot] = random_state(shape, state_dtype)
    before, bytes_before, truth_pool = pool.clone(), memory(pool).clone(), pool.double()
    with force_backend("reference"):
        truth = gated_delta_rule_decode(*tokens.double(), *gates, truth_pool, slots)
    with force_backend(backend):
        out = gated_delta_rule_decode(*tokens, *gates, pool, slots)
    expected = roundings(shape, 1, torch.float32, stored=0)
    assert out.dtype == dtype
    assert_close(out, truth, expected)
    assert not out[3:5].any()
    assert_close(pool[live], truth_pool[live], expected)
    assert only_written(pool, before, bytes_before, live)


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_snapshots_agree_with_float64(backend: str, shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    lengths, cuts = [0, 1, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE], torch.tensor([0, 0, 1, 1, 2]) * CHUNK_SIZE
    gates, runs = random_gates(shape), random_runs(shape, lengths, dtype, state_dtype)
    pool, slots = place(runs, state_dtype, columns=2)
    slots, snapshot_slots = slots.unbind(1)
    truth_pool, tokens = pool.double(), join(runs)
    where = (slots, start_offsets(lengths), torch.arange(len(runs)) != 2, snapshot_slots, cuts)
    with force_backend("reference"):
        truth = gated_delta_rule_prefill(*tokens.double(), *gates, truth_pool, *where)
    with force_backend(backend):
        out = gated_delta_rule_prefill(*tokens, *gates, pool, *where)
    stored = max(lengths) if backend == "reference" else max(lengths) // CHUNK_SIZE
    expected = roundings(shape, max(lengths), state_dtype, stored)
    assert_close(out, truth, roundings_of_prefill(expected, backend, dtype))
    assert_close(pool[snapshot_slots], truth_pool[snapshot_slots], expected)


@pytest.mark.parametrize("step_dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_verify_with_a_step_pool_agrees_with_float64(
    backend: str, shape: Shape, dtype: torch.dtype, state_dtype: torch.dtype, step_dtype: torch.dtype
) -> None:
    lengths = [1, 2, 3, 4, 4, 3, 2, 1]
    gates, runs = random_gates(shape), random_runs(shape, lengths, dtype, state_dtype)
    pool, slots = place(runs, state_dtype)
    step_rows, tokens = distinct_slots(8, 10), join(runs)
    where = (slots, start_offsets(lengths), torch.ones(8, dtype=torch.int32))
    steps = nan_steps(10, COLUMNS, shape.state, step_dtype, steps_first=False)
    truth_steps = steps.double()
    with force_backend("reference"):
        truth = gated_delta_rule_verify(*tokens.double(), *gates, pool.double(), *where, truth_steps, step_rows)
    with force_backend(backend):
        out = gated_delta_rule_verify(*tokens, *gates, pool, *where, steps, step_rows)
    expected = roundings(shape, COLUMNS, step_dtype, stored=COLUMNS)
    assert_close(out, truth, expected)
    for row, length in zip(step_rows, lengths, strict=True):
        assert_close(steps[row, :length], truth_steps[row, :length], expected)


@pytest.mark.parametrize("referee", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_prefill_and_its_state_agree_with_transformers(
    backend: str, shape: Shape, with_state: bool, referee: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    gates = random_gates(shape)
    for length in (1, 5, 64, 130):
        state = random_state(shape, torch.float32) if with_state else None
        run = Run(random_tokens(shape, length, torch.float32), state)
        with force_backend(backend):
            (ours,) = prefill([run], gates, torch.float32)
        theirs = by_transformers(referee, run, *gates)
        # Both sides round.
        expected = roundings(shape, 2 * length, torch.float32, stored=0)
        assert_close(ours.out, theirs.out, expected)
        assert_close(ours.state, theirs.state, expected)


@pytest.mark.parametrize("call", [decode, verify])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_decode_and_verify_agree_with_transformers(
    backend: str, shape: Shape, call: Callable[..., list[Result]]
) -> None:
    gates, length = random_gates(shape), 1 if call is decode else COLUMNS
    runs = [Run(random_tokens(shape, length, torch.float32), random_state(shape, torch.float32)) for _ in range(5)]
    with force_backend(backend):
        results = call(runs, gates, torch.float32)
    for run, ours in zip(runs, results, strict=True):
        theirs = by_transformers(torch_recurrent_gated_delta_rule, run, *gates)
        expected = roundings(shape, 2 * length, torch.float32, stored=0)
        assert_close(ours.out, theirs.out, expected)
        assert_close(ours.state, theirs.state, expected)


def by_transformers(referee: Callable[..., tuple[Tensor, Tensor]], run: Run, A_log: Tensor, dt_bias: Tensor) -> Result:
    """The lines of ``Qwen3NextGatedDeltaNet.forward`` around the rule; the state there is [HV, K, V]."""
    q, k, v, a, b = (x[None] for x in run.tokens)
    group = v.shape[2] // q.shape[2]
    out, state = referee(
        q.repeat_interleave(group, dim=2),
        k.repeat_interleave(group, dim=2),
        v,
        g=-A_log.exp() * F.softplus(a + dt_bias),
        beta=b.sigmoid(),
        initial_state=None if run.state is None else run.state[None].transpose(2, 3),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return Result(out[0], state[0].transpose(1, 2))


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_zero_keys_and_strong_decays_stay_finite(backend: str) -> None:
    shape = SHAPES[0]
    tokens = random_tokens(shape, 130, torch.float32)
    tokens.q.zero_()
    tokens.k.zero_()
    tokens.a.fill_(1e4)
    with force_backend(backend):
        ((out, state),) = prefill([Run(tokens, random_state(shape, torch.float32))], random_gates(shape), torch.float32)
    assert not out.any()
    assert not state.any()


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_an_empty_batch_is_served(backend: str) -> None:
    shape = SHAPES[1]
    tokens, gates = random_tokens(shape, 0, torch.float32), random_gates(shape)
    pool = nan_pool(3, shape.state, torch.float32)
    steps = nan_steps(3, COLUMNS, shape.state, torch.float32, steps_first=False)
    none, offsets = torch.empty(0, dtype=torch.int32), start_offsets([])
    columns = none[:, None].expand(0, COLUMNS)
    with force_backend(backend):
        results = [
            gated_delta_rule_decode(*tokens, *gates, pool, none),
            gated_delta_rule_prefill(*tokens, *gates, pool, none, offsets, none.bool()),
            gated_delta_rule_prefill(*tokens, *gates, pool, none, offsets, none.bool(), none, none),
            gated_delta_rule_verify(*tokens, *gates, pool, columns, offsets, none),
            gated_delta_rule_verify(*tokens, *gates, pool, columns, offsets, none, steps, none),
        ]
    assert [result.shape for result in results] == [tokens.v.shape] * 5
    assert pool.isnan().all()
    assert steps.isnan().all()


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "prefill": gated_delta_rule_prefill,
    "prefill with snapshots": gated_delta_rule_prefill,
    "verify": gated_delta_rule_verify,
    "verify with steps": gated_delta_rule_verify,
    "decode": gated_delta_rule_decode,
}
BAD_ANYWHERE = [
    Bad("q", "of fewer tokens", lambda x: x[:-1], ValueError),
    Bad("q", "two dimensions", lambda x: x[0], ValueError),
    Bad("q", "another float dtype", lambda x: x.bfloat16(), TypeError),
    Bad("k", "of fewer heads", lambda x: x[:, :-1], ValueError),
    Bad("k", "another key dim", lambda x: x[:, :, :-1], ValueError),
    Bad("k", "another float dtype", lambda x: x.double(), TypeError),
    Bad("v", "two dimensions", lambda x: x[0], ValueError),
    Bad("v", "heads that no group divides", lambda x: x[:, :-1], ValueError),
    Bad("v", "integers", lambda x: x.long(), TypeError),
    Bad("a", "of fewer heads", lambda x: x[:, :-1], ValueError),
    Bad("a", "integers", lambda x: x.int(), TypeError),
    Bad("b", "of fewer tokens", lambda x: x[:-1], ValueError),
    Bad("b", "booleans", lambda x: x > 0, TypeError),
    Bad("A_log", "of fewer heads", lambda x: x[:-1], ValueError),
    Bad("A_log", "integers", lambda x: x.int(), TypeError),
    Bad("dt_bias", "two dimensions", lambda x: x[None], ValueError),
    Bad("dt_bias", "integers", lambda x: x.int(), TypeError),
    Bad("state", "key dim first", lambda x: x.transpose(2, 3), ValueError),
    Bad("state", "of fewer heads", lambda x: x[:, :-1], ValueError),
    Bad("state", "one slot", lambda x: x[0], ValueError),
    Bad("state", "integers", lambda x: x.int(), TypeError),
    Bad("slots", "of fewer sequences", lambda x: x[:-1], ValueError),
    Bad("slots", "floats", lambda x: x.float(), TypeError),
    Bad("slots", "beyond the pool", lambda x: x + 20, IndexError),
    Bad("slots", "below −1", lambda x: x - 21, IndexError),
]
BAD_OFFSETS = [
    Bad("query_start_loc", "falling", lambda x: x[[0, 2, 1, 3]], ValueError),
    Bad("query_start_loc", "beyond the tokens", lambda x: x + torch.tensor([0, 0, 0, 1]), ValueError),
    Bad("query_start_loc", "short of the tokens", lambda x: x - torch.tensor([0, 0, 0, 1]), ValueError),
    Bad("query_start_loc", "not from 0", lambda x: x + torch.tensor([1, 0, 0, 0]), ValueError),
    Bad("query_start_loc", "empty", lambda x: x[:0], ValueError),
    Bad("query_start_loc", "two dimensions", lambda x: x[None], ValueError),
    Bad("query_start_loc", "floats", lambda x: x.float(), TypeError),
]
BAD_PREFILL = [
    Bad("has_initial_state", "of fewer sequences", lambda x: x[:-1], ValueError),
    Bad("has_initial_state", "integers", lambda x: x.int(), TypeError),
]
BAD_VERIFY = [
    Bad("slots", "one dimension", lambda x: x[:, 0], ValueError),
    Bad("num_accepted_tokens", "of fewer sequences", lambda x: x[:-1], ValueError),
    Bad("num_accepted_tokens", "floats", lambda x: x.float(), TypeError),
    Bad("num_accepted_tokens", "zero", lambda x: x - 1, IndexError),
    Bad("num_accepted_tokens", "more than columns", lambda x: x + COLUMNS, IndexError),
    Bad("query_start_loc", "more tokens than columns", lambda x: x * torch.tensor([0, 0, 0, 1]), ValueError),
]
BAD_SNAPSHOTS = [
    Bad("snapshot_slots", "missing", lambda x: None, ValueError),
    Bad("snapshot_slots", "of fewer sequences", lambda x: x[:-1], ValueError),
    Bad("snapshot_slots", "floats", lambda x: x.float(), TypeError),
    Bad("snapshot_slots", "beyond the pool", lambda x: x + 20, IndexError),
    Bad("snapshot_slots", "below −1", lambda x: x - 21, IndexError),
    Bad("snapshot_lengths", "missing", lambda x: None, ValueError),
    Bad("snapshot_lengths", "of fewer sequences", lambda x: x[:-1], ValueError),
    Bad("snapshot_lengths", "floats", lambda x: x.float(), TypeError),
    Bad("snapshot_lengths", "below 0", lambda x: x - CHUNK_SIZE, ValueError),
    Bad("snapshot_lengths", "beyond the sequence", lambda x: x + CHUNK_SIZE, ValueError),
    Bad("snapshot_lengths", "within a chunk", lambda x: x + 1, ValueError),
]
BAD_STEPS = [
    Bad("step_state", "missing", lambda x: None, ValueError),
    Bad("step_state", "one row", lambda x: x[0], ValueError),
    Bad("step_state", "of fewer heads", lambda x: x[:, :, :-1], ValueError),
    Bad("step_state", "key dim first", lambda x: x.transpose(3, 4), ValueError),
    Bad("step_state", "integers", lambda x: x.int(), TypeError),
    Bad("step_rows", "missing", lambda x: None, ValueError),
    Bad("step_rows", "of fewer sequences", lambda x: x[:-1], ValueError),
    Bad("step_rows", "floats", lambda x: x.float(), TypeError),
    Bad("step_rows", "beyond the step pool", lambda x: x + 5, IndexError),
    Bad("step_rows", "below −1", lambda x: x - 6, IndexError),
    Bad("query_start_loc", "more tokens than steps", lambda x: torch.tensor([0, 0, 2, 6]), ValueError),
]


@pytest.mark.parametrize(
    ("operation", "bad"),
    [
        *((name, bad) for name in OPERATIONS for bad in BAD_ANYWHERE),
        *((name, bad) for name in OPERATIONS if name != "decode" for bad in BAD_OFFSETS),
        *(("prefill", bad) for bad in BAD_PREFILL),
        *(("prefill with snapshots", bad) for bad in BAD_SNAPSHOTS),
        *((name, bad) for name in ("verify", "verify with steps") for bad in BAD_VERIFY),
        *(("verify with steps", bad) for bad in BAD_STEPS),
    ],
    ids=str,
)
def test_bad_input_is_refused_by_name_before_anything_is_written(operation: str, bad: Bad) -> None:
    shape = Shape(2, 2, 8, 6)
    lengths = [1, 1, 1] if operation == "decode" else [1, 2, 3]
    pool = nan_pool(20, shape.state, torch.float32)
    pool.normal_()
    slots = distinct_slots(3 * COLUMNS, 20).view(3, COLUMNS)
    arguments: dict[str, Any] = {
        **random_tokens(shape, sum(lengths), torch.float32)._asdict(),
        **random_gates(shape)._asdict(),
        "state": pool,
        "slots": slots if operation.startswith("verify") else slots[:, 0],
    }
    if operation != "decode":
        arguments["query_start_loc"] = start_offsets(lengths)
    if operation.startswith("prefill"):
        arguments["has_initial_state"] = torch.tensor([True, False, True])
    if operation.startswith("verify"):
        arguments["num_accepted_tokens"] = torch.tensor([1, 1, 1])
    if operation == "prefill with snapshots":
        arguments["snapshot_slots"], arguments["snapshot_lengths"] = slots[:, 1], torch.zeros(3, dtype=torch.int32)
    steps = nan_steps(5, COLUMNS - 1, shape.state, torch.float32, steps_first=False)
    if operation == "verify with steps":
        arguments["step_state"], arguments["step_rows"] = steps, distinct_slots(3, 5)
    before = memory(pool).clone()
    with pytest.raises(bad.error, match=f"^{bad.argument}:"):
        OPERATIONS[operation](**(arguments | {bad.argument: bad.change(arguments[bad.argument])}))
    assert torch.equal(memory(pool), before)
    assert steps.isnan().all()


@pytest.mark.parametrize("decay", [1.0, 0.02])
def test_outputs_of_a_native_prefill_of_bfloat16_err_by_two_roundings_and_states_by_those_of_float32(
    decay: float,
) -> None:
    shape, count = Shape(2, 1, 128, 128), 300
    tokens, gates = random_tokens(shape, count, torch.bfloat16), random_gates(shape)
    gates = gates._replace(A_log=gates.A_log + math.log(decay))
    where = torch.tensor([0]), torch.tensor([0, count]), torch.tensor([False])
    pool, true_pool = torch.zeros(1, *shape.state), torch.zeros(1, *shape.state, dtype=torch.float64)
    with force_backend("native"):
        out = gated_delta_rule_prefill(*tokens, *gates, pool, *where).double()
    with force_backend("reference"):
        doubles = (x.double() for x in (*tokens, *gates))
        truth = gated_delta_rule_prefill(*doubles, true_pool, *where)
    # The state that meets the queries is rounded, and so is the result: both err alike, and add up as √2.
    assert (out - truth).norm() <= 1.5 * (truth.bfloat16().double() - truth).norm()
    assert (pool - true_pool).norm() <= 1e-5 * true_pool.norm()
