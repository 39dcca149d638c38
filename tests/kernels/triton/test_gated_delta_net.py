"""Decode and verify of a Gated DeltaNet layer as one kernel, interpreted: numbers, promises, no lane out of bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qnext_kernels import (
    causal_conv1d_prefill,
    force_backend,
    gated_delta_net,
    gated_delta_net_decode,
    gated_delta_net_verify,
    gated_delta_rule_prefill,
    gated_rms_norm,
)
from qnext_kernels.gated_delta_net import triton_fused
from qnext_kernels.gated_delta_net.split import split_convolved
from qnext_kernels.gated_delta_net.triton_fused import run_fused
from qnext_kernels.gated_delta_rule.cpu import RECURRENT_TOKENS
from tests.kernels import delta_net_runs as runs_of
from tests.kernels import test_gated_delta_net as of_any_backend
from tests.kernels.delta_net_runs import (
    EPS,
    WIDTH,
    Pools,
    Result,
    Run,
    empty_pools,
    empty_steps,
    join,
    random_layer,
    random_runs,
)
from tests.kernels.delta_rule_runs import COLUMNS, Shape
from tests.kernels.kernel_inputs import assert_close, distinct_slots, memory, same_bits, start_offsets
from tests.kernels.triton.interpreter import shuffled_programs

pytestmark = pytest.mark.usefixtures("interpreter")

SHAPES = [Shape(2, 2, 16, 16), Shape(1, 3, 20, 28), Shape(2, 1, 40, 24)]
CASES = [
    (SHAPES[0], torch.bfloat16, torch.bfloat16, torch.float32),
    (SHAPES[1], torch.float32, torch.bfloat16, torch.float32),
    (SHAPES[2], torch.float16, torch.float32, torch.bfloat16),
]
cases = pytest.mark.parametrize(("shape", "dtype", "conv_dtype", "state_dtype"), CASES)


def assert_same(actual: Result, expected: Result) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert same_bits(ours, theirs)


def roundings(
    shape: Shape, tokens: int, dtype: torch.dtype, conv_dtype: torch.dtype, state_dtype: torch.dtype
) -> dict[torch.dtype, int]:
    """Of q, k, v and the rule's output in the activations' dtype, of inputs and states in the pools'."""
    counts = {torch.float32: 2 * WIDTH + 8 * tokens + shape.key_dim + shape.value_dim}
    for narrow, count in ((dtype, 4 * tokens), (conv_dtype, 3 * tokens), (state_dtype, tokens)):
        if narrow != torch.float32:
            counts[narrow] = counts.get(narrow, 0) + count
    return counts


CALLS = [
    (runs_of.decode, gated_delta_net_decode),
    (runs_of.verify, gated_delta_net_verify),
    (runs_of.verify_into_steps, gated_delta_net_verify),
]
calls = pytest.mark.parametrize(("call", "function"), CALLS)


@calls
@cases
def test_it_agrees_with_the_operations_in_float64(
    call: Callable[..., list[Result]],
    function: Callable[..., Tensor],
    shape: Shape,
    dtype: torch.dtype,
    conv_dtype: torch.dtype,
    state_dtype: torch.dtype,
) -> None:
    layer = random_layer(shape)
    lengths = [1, 1] if call is runs_of.decode else [1, 3, COLUMNS, 2]
    runs = random_runs(shape, lengths, dtype, conv_dtype, state_dtype)
    for run, ours in zip(runs, call(function, shape, layer, runs), strict=True):
        with force_backend("reference"):
            (truth,) = call(function, shape, layer.double(), [Run(*(x.double() for x in run))])
        expected = roundings(shape, len(run.qkvz), dtype, conv_dtype, state_dtype)
        assert ours.out.dtype == dtype
        for actual, exact in zip(ours, truth, strict=True):
            assert_close(actual, exact, expected)


@pytest.mark.parametrize("call", [runs_of.verify, runs_of.verify_into_steps])
@cases
def test_verify_equals_repeated_decode(
    call: Callable[..., list[Result]],
    shape: Shape,
    dtype: torch.dtype,
    conv_dtype: torch.dtype,
    state_dtype: torch.dtype,
) -> None:
    layer, runs = random_layer(shape), random_runs(shape, [1, 2, COLUMNS], dtype, conv_dtype, state_dtype)
    for run, verified in zip(runs, call(gated_delta_net_verify, shape, layer, runs), strict=True):
        assert_same(verified, runs_of.repeated_decode(gated_delta_net_decode, shape, layer, run))


@calls
def test_a_sequence_does_not_depend_on_the_batch_or_the_order_of_programs(
    call: Callable[..., list[Result]], function: Callable[..., Tensor]
) -> None:
    shape, dtypes = CASES[0][0], CASES[0][1:]
    layer = random_layer(shape)
    runs = random_runs(shape, [1] * 4 if call is runs_of.decode else [1, 2, 4, 3], *dtypes)
    order = torch.randperm(len(runs)).tolist()
    together = call(function, shape, layer, runs)
    with shuffled_programs(seed=1):
        shuffled = call(function, shape, layer, [runs[n] for n in order])
    for n, other in zip(order, shuffled, strict=True):
        assert_same(other, together[n])
        assert_same(call(function, shape, layer, [runs[n]])[0], together[n])


@calls
@cases
def test_projections_that_lie_side_by_side_have_the_bits_of_two(
    call: Callable[..., list[Result]],
    function: Callable[..., Tensor],
    shape: Shape,
    dtype: torch.dtype,
    conv_dtype: torch.dtype,
    state_dtype: torch.dtype,
) -> None:
    def of_one(qkvz: Tensor, ba: Tensor, *arguments: object) -> Tensor:
        parts = qkvz.flatten(1), ba.flatten(1)
        one, other = torch.cat(parts, dim=1).split([part.shape[1] for part in parts], dim=1)
        return function(one.view(qkvz.shape), other.view(ba.shape), *arguments)

    layer, runs = random_layer(shape), random_runs(shape, [1, 3, 2], dtype, conv_dtype, state_dtype)
    torch.manual_seed(0)
    expected = call(function, shape, layer, runs)
    torch.manual_seed(0)
    for actual, want in zip(call(of_one, shape, layer, runs), expected, strict=True):
        assert_same(actual, want)


@calls
def test_rows_of_a_state_that_come_one_block_after_the_other_have_the_bits_of_all_at_once(
    call: Callable[..., list[Result]], function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, dtypes = CASES[1][0], CASES[1][1:]
    layer = random_layer(shape)
    runs = random_runs(shape, [1, 1] if call is runs_of.decode else [1, COLUMNS], *dtypes)
    expected = call(function, shape, layer, runs)
    assert triton_fused.configuration(shape.key_dim, shape.value_dim)["BLOCK_V"] >= shape.value_dim
    monkeypatch.setattr(triton_fused, "LARGEST_TILE", 8 * 32)
    assert triton_fused.configuration(shape.key_dim, shape.value_dim)["BLOCK_V"] == 8
    for actual, want in zip(call(function, shape, layer, runs), expected, strict=True):
        assert_same(actual, want)


def some_pools(shape: Shape, slots: int, drafts: int) -> Pools:
    pools = empty_pools(shape, slots, drafts, (torch.bfloat16, torch.float32), channels_last=True)
    for pool in pools:
        pool.normal_()
    return pools


@pytest.mark.parametrize("with_steps", [False, True])
def test_padding_is_skipped_and_nothing_else_is_written(with_steps: bool) -> None:
    """The slot of the convolution is padding, or the one that the rule starts from, or one that it would write."""
    shape, lengths = SHAPES[0], [2, 2, 2, 1, 0, COLUMNS]
    layer = random_layer(shape)
    qkvz, ba = join(random_runs(shape, lengths, *CASES[0][1:]))
    slots = distinct_slots(len(lengths) * COLUMNS, 27).view(-1, COLUMNS)
    accepted = torch.tensor([2, 2, 1, 1, 3, 4])
    slots[0], slots[1, 0], slots[2, 1], slots[5, 3] = -1, -1, -1, -1
    where = slots, start_offsets(lengths), accepted
    steps = [pool.contiguous().normal_() for pool in empty_steps(shape, 8, CASES[0][2:])] if with_steps else []
    rows = [torch.tensor([4, 2, 7, -1, 0, 5])] if with_steps else []
    ours = [*some_pools(shape, 27, COLUMNS - 1), *steps]
    before, bytes_before = [pool.clone() for pool in ours], [memory(pool).clone() for pool in ours]
    theirs = [pool.clone() for pool in ours]
    out = gated_delta_net_verify(qkvz, ba, *layer, EPS, *ours[:2], *where, *ours[2:], *rows)
    with force_backend("reference"):
        expected = gated_delta_net_verify(qkvz, ba, *layer, EPS, *theirs[:2], *where, *theirs[2:], *rows)
    counts = roundings(shape, COLUMNS, *CASES[0][1:])
    assert_close(out, expected, counts)
    assert not out[:2].any()
    for pool, reference, old, bytes_ in zip(ours, theirs, before, bytes_before, strict=True):
        assert_close(pool, reference, counts)
        written = reference != old
        pool[written] = old[written]
        assert torch.equal(memory(pool), bytes_)


def test_padding_behind_the_last_sequence_of_a_verify_has_zero_outputs() -> None:
    shape, padding = SHAPES[0], 3
    layer = random_layer(shape)
    qkvz, ba = join(random_runs(shape, [2, 1, padding], *CASES[0][1:]))
    slots, accepted = distinct_slots(4 * COLUMNS, 17).view(4, COLUMNS), torch.ones(4, dtype=torch.int64)
    slots[2:] = -1
    ends = start_offsets([2, 1, 0, 0])
    padded, exact = (some_pools(shape, 17, COLUMNS - 1) for _ in range(2))
    for pool, other in zip(padded, exact, strict=True):
        other.copy_(pool)
    out = run_fused(qkvz, ba, *layer, EPS, *padded, slots, ends, accepted)
    expected = run_fused(qkvz[:3], ba[:3], *layer, EPS, *exact, slots, ends, accepted)
    assert not out[3:].any()
    for actual, want in zip((out[:3], *padded), (expected, *exact), strict=True):
        assert same_bits(actual, want)


def test_counts_that_no_host_checks_are_clamped() -> None:
    shape, lengths = SHAPES[0], [2, 2]
    layer, runs = random_layer(shape), random_runs(shape, lengths, *CASES[0][1:])
    slots = distinct_slots(2 * COLUMNS, 11).view(2, COLUMNS)
    results = []
    before = some_pools(shape, 11, COLUMNS - 1)
    for accepted in (torch.tensor([1, COLUMNS]), torch.tensor([-7, 2**40])):
        pools = Pools(*(pool.clone() for pool in before))
        out = run_fused(*join(runs), *layer, EPS, *pools, slots, start_offsets(lengths), accepted)
        results.append((out, *pools))
    for actual, want in zip(*results, strict=True):
        assert same_bits(actual, want)


@pytest.mark.parametrize("with_steps", [False, True])
def test_verify_has_the_bits_of_the_operations_one_after_the_other(with_steps: bool) -> None:
    of_any_backend.test_verify_is_the_operations_one_after_the_other("triton", with_steps)


def test_decode_has_the_bits_of_the_operations_one_after_the_other() -> None:
    of_any_backend.test_decode_is_the_operations_one_after_the_other("triton")


def test_prefill_has_the_bits_of_the_operations_one_after_the_other() -> None:
    of_any_backend.test_prefill_is_the_operations_one_after_the_other("triton", True)


@pytest.mark.parametrize("call", ["decode", "prefill", "verify"])
def test_a_destination_gets_the_result_and_nothing_around_it_is_written(call: str) -> None:
    of_any_backend.test_a_destination_gets_the_result_and_nothing_around_it_is_written("triton", call)


def test_verify_has_the_bits_of_a_prefill_of_few_tokens() -> None:
    shape, dtypes, lengths = CASES[0][0], CASES[0][1:], [1, RECURRENT_TOKENS]
    layer, runs = random_layer(shape), random_runs(shape, lengths, *dtypes)
    conv_state, state = empty_pools(shape, 5, 0, dtypes[1:])
    slots, known = torch.tensor([3, 0]), torch.tensor([True, True])
    for slot, run in zip(slots, runs, strict=True):
        conv_state[slot], state[slot] = run.history, run.state
    mixed, z, a, b = of_any_backend.head_by_head(*join(runs), shape)
    where = slots, start_offsets(lengths), known
    convolved = causal_conv1d_prefill(mixed, layer.conv_weight, conv_state, *where)
    tokens = *split_convolved(convolved, state), a, b, layer.A_log, layer.dt_bias
    out = gated_rms_norm(gated_delta_rule_prefill(*tokens, state, *where), z, layer.norm_weight, EPS).flatten(1)
    verified = runs_of.verify(gated_delta_net_verify, shape, layer, runs)
    for slot, part, ours in zip(slots, out.split(lengths), verified, strict=True):
        assert_same(ours, Result(part, conv_state[slot], state[slot]))


def test_a_backend_forced_for_one_of_the_operations_ends_the_fusion() -> None:
    shape = SHAPES[0]
    projections = join(random_runs(shape, [1], *CASES[0][1:]))
    tensors = *projections, tuple(random_layer(shape)), *some_pools(shape, 1, 0)
    assert gated_delta_net._one_kernel(*tensors) is not None
    with force_backend("gated_delta_rule=triton_context_parallel"):
        assert gated_delta_net._one_kernel(*tensors) is not None, "its decode is Triton's"
    for name in ("causal_conv1d", "gated_delta_rule", "gated_norm"):
        with force_backend(f"{name}=reference"):
            assert gated_delta_net._one_kernel(*tensors) is None


def test_an_empty_batch_and_sequences_without_tokens_are_served() -> None:
    shape = SHAPES[1]
    layer, pools = random_layer(shape), empty_pools(shape, 3, COLUMNS, (torch.float32, torch.float32))
    width = 2 * shape.key_dim + 2 * shape.group * shape.value_dim
    none = torch.empty(0, shape.key_heads, width), torch.empty(0, shape.key_heads, 2 * shape.group)
    slots = torch.arange(2, dtype=torch.int32)
    results = [
        gated_delta_net_decode(*none, *layer, EPS, *pools, slots[:0]),
        gated_delta_net_verify(
            *none, *layer, EPS, *pools, slots[:, None], start_offsets([0, 0]), torch.ones_like(slots)
        ),
    ]
    assert [result.shape for result in results] == [(0, shape.value_heads * shape.value_dim)] * 2
    assert all(pool.isnan().all() for pool in pools)
