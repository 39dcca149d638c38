"""A prefill in the deterministic mode, token by token, interpreted: a cut anywhere changes no bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from qnext_kernels import (
    force_backend,
    gated_delta_net_decode,
    gated_delta_net_prefill,
    gated_delta_net_verify,
    gated_delta_rule_prefill,
)
from qnext_kernels.dispatch import deterministic
from tests.kernels import delta_net_runs
from tests.kernels import test_gated_delta_rule as numbers
from tests.kernels import test_gated_delta_rule_bitwise as promises
from tests.kernels.delta_net_runs import EPS
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

LENGTHS = (0, 1, 2, 3, 9)
CASES = [(SHAPES[0], torch.float32), (SHAPES[1], torch.bfloat16), (SHAPES[2], torch.float16)]
cases = pytest.mark.parametrize(("shape", "dtype"), CASES)


@pytest.fixture
def mode(interpreter: None) -> Iterator[None]:
    with deterministic():
        yield


@pytest.mark.usefixtures("mode")
@cases
def test_prefill_agrees_with_float64(shape: Shape, dtype: torch.dtype) -> None:
    # Every length with and without an initial state; the last two are padding.
    lengths = [*LENGTHS, *LENGTHS, 2, 1]
    tokens, gates = random_tokens(shape, sum(lengths), dtype), random_gates(shape)
    pool = nan_pool(20, shape.state, torch.float32)
    slots, known = distinct_slots(len(lengths), 20), torch.arange(len(lengths)) < len(LENGTHS)
    slots[-2:] = -1
    for slot in slots[(slots >= 0) & known]:
        pool[slot] = random_state(shape, torch.float32)
    before, bytes_before = pool.clone(), memory(pool).clone()
    truth_pool, offsets = pool.double(), start_offsets(lengths)
    with deterministic(False), force_backend("reference"):
        truth = gated_delta_rule_prefill(*tokens.double(), *gates, truth_pool, slots, offsets, known)
    out = gated_delta_rule_prefill(*tokens, *gates, pool, slots, offsets, known)
    expected = {torch.float32: 8 * max(lengths) + shape.key_dim}
    written = slots[(slots >= 0) & (offsets.diff() > 0)]
    assert out.dtype == dtype
    assert_close(out, truth, expected)
    assert not out[offsets[-3] :].any()
    assert_close(pool[written], truth_pool[written], expected)
    assert only_written(pool, before, bytes_before, written)


def in_pieces(run: Run, pieces: Sequence[int], gates: Gates) -> Result:
    outputs, state, start = [], run.state, 0
    for length in pieces:
        piece = Run(run.tokens.rows(slice(start, start + length)), state)
        ((out, state),) = prefill([piece], gates, torch.float32)
        outputs.append(out)
        start += length
    assert state is not None
    return Result(torch.cat(outputs), state)


@pytest.mark.usefixtures("mode")
@cases
def test_a_prefill_split_anywhere_has_the_bits_of_the_unsplit_one_and_of_decodes(
    shape: Shape, dtype: torch.dtype
) -> None:
    gates, (run,) = random_gates(shape), random_runs(shape, [13], dtype, torch.float32)
    whole = in_pieces(run, [13], gates)
    for pieces in ([1, 12], [3, 8, 2]):
        promises.assert_same(in_pieces(run, pieces, gates), whole)
    promises.assert_same(repeated_decode(run, gates, torch.float32), whole)
    fresh = Run(run.tokens, None)
    promises.assert_same(in_pieces(fresh, [2, 11], gates), in_pieces(fresh, [13], gates))


@pytest.mark.usefixtures("mode")
@cases
def test_a_verify_has_the_bits_of_a_prefill(shape: Shape, dtype: torch.dtype) -> None:
    gates, runs = random_gates(shape), random_runs(shape, [1, 2, 4], dtype, torch.float32)
    for ours, theirs in zip(verify(runs, gates, torch.float32), prefill(runs, gates, torch.float32), strict=True):
        promises.assert_same(ours, theirs)


@pytest.mark.usefixtures("mode")
def test_a_sequence_does_not_depend_on_the_batch_or_the_order_of_programs() -> None:
    shape = SHAPES[0]
    gates, runs = random_gates(shape), random_runs(shape, [1, 8, 3, 5], torch.bfloat16, torch.float32)
    order = [2, 0, 3, 1]
    together = prefill(runs, gates, torch.float32)
    with shuffled_programs(seed=1):
        shuffled = prefill([runs[n] for n in order], gates, torch.float32)
    for n, other in zip(order, shuffled, strict=True):
        promises.assert_same(other, together[n])
        promises.assert_same(prefill([runs[n]], gates, torch.float32)[0], together[n])


@pytest.mark.usefixtures("mode")
def test_a_snapshot_equals_a_prefill_of_its_tokens_and_changes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "SNAPSHOTS", [(0, 0), (1, 0), (64, 64), (65, 64)])
    promises.test_a_snapshot_equals_a_prefill_of_its_tokens_and_changes_nothing_else(
        "triton", Shape(1, 1, 16, 12), torch.bfloat16, torch.float32
    )


def prefill_layer(shape: Shape, layer: delta_net_runs.Layer, run: delta_net_runs.Run) -> delta_net_runs.Result:
    pools = delta_net_runs.empty_pools(shape, 4, 0, delta_net_runs.dtypes_of([run]))
    slots = distinct_slots(1, 4)
    for pool, state in zip(pools, (run.history, run.state), strict=True):
        pool[slots] = state
    offsets, known = start_offsets([len(run.qkvz)]), torch.tensor([True])
    out = gated_delta_net_prefill(run.qkvz, run.ba, *layer, EPS, *pools, slots, offsets, known)
    return delta_net_runs.Result(out, pools.conv[slots[0]].clone(), pools.state[slots[0]].clone())


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize(
    ("shape", "dtype", "conv_dtype"),
    [(Shape(1, 2, 16, 16), torch.bfloat16, torch.bfloat16), (Shape(2, 1, 20, 12), torch.float32, torch.bfloat16)],
)
def test_a_layer_gives_the_same_bits_however_its_tokens_come(
    shape: Shape, dtype: torch.dtype, conv_dtype: torch.dtype
) -> None:
    """At once, or by turns prefilled, decoded and verified in pieces around every boundary of a block."""
    layer = delta_net_runs.random_layer(shape)
    (run,) = delta_net_runs.random_runs(shape, [77], dtype, conv_dtype, torch.float32)
    whole = prefill_layer(shape, layer, run)
    outputs, start = [], 0
    for call, length in [
        ("prefill", 1), ("decode", 1), ("verify", 3), ("prefill", 2), ("steps", 4), ("prefill", 31), ("decode", 1),
        ("prefill", 33), ("verify", 1),
    ]:  # fmt: skip
        piece = run.rows(slice(start, start + length))
        if call == "prefill":
            result = prefill_layer(shape, layer, piece)
        elif call == "decode":
            (result,) = delta_net_runs.decode(gated_delta_net_decode, shape, layer, [piece])
        else:
            verified = delta_net_runs.verify if call == "verify" else delta_net_runs.verify_into_steps
            (result,) = verified(gated_delta_net_verify, shape, layer, [piece])
        outputs.append(result.out)
        run = run._replace(history=result.history, state=result.state)
        start += length
    assert start == len(run.qkvz)
    assert same_bits(torch.cat(outputs), whole.out)
    assert same_bits(run.history, whole.history)
    assert same_bits(run.state, whole.state)


@pytest.mark.usefixtures("mode")
def test_an_empty_batch_is_served() -> None:
    numbers.test_an_empty_batch_is_served("triton")
