"""The walk in Gluon, run with a model of Hopper: numbers, promises, and nothing read before it is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext_kernels import force_backend, gated_delta_rule_prefill
from qnext_kernels.gated_delta_rule import CHUNK_SIZE, gluon_walk, triton_recurrent, triton_segments, triton_state
from qnext_kernels.gated_delta_rule.cpu import RECURRENT_TOKENS
from qnext_kernels.gated_delta_rule.reference import ReferenceBackend
from qnext_kernels.gated_delta_rule.triton import TritonGatedDeltaRule
from qnext_kernels.gated_delta_rule.triton_chunked import Configuration, solve_chunks
from qnext_kernels.triton_support import current_target
from tests.kernels import test_gated_delta_rule_bitwise as promises
from tests.kernels.delta_rule_runs import (
    MODEL_SHAPE,
    Gates,
    Result,
    Run,
    Shape,
    Tokens,
    join,
    place,
    prefill,
    random_gates,
    random_runs,
    random_state,
    random_tokens,
)
from tests.kernels.kernel_inputs import (
    LENGTHS,
    assert_close,
    distinct_slots,
    memory,
    nan_pool,
    only_written,
    same_bits,
    start_offsets,
)
from tests.kernels.triton import test_gated_delta_rule as serial
from tests.kernels.triton.gluon_model import modelled
from tests.kernels.triton.interpreter import kernels_run

ONE_HEAD = Shape(1, 1, 128, 128)
DTYPES = torch.bfloat16, torch.float32


def last_tokens(
    tokens: Sequence[Tensor], out: Tensor, state: Tensor, slots: Tensor, query_start_loc: Tensor, has_initial: Tensor
) -> None:
    """What ``run_recurrent`` does behind a prefill, by the reference: interpreted it takes most of the time."""
    offsets = query_start_loc.tolist()
    for n, (start, end) in enumerate(pairwise(offsets)):
        count = (end - start) % CHUNK_SIZE
        if 0 < count <= RECURRENT_TOKENS:
            q, k, v, a, b = (x[end - count : end].float() for x in tokens[:5])
            known = has_initial[n : n + 1] | (end - start > count)
            batch = *Gates(*tokens[5:]), state, slots[n : n + 1], start_offsets([count]), known
            out[end - count : end] = ReferenceBackend().prefill(q, k, v, a, b, *batch)


@pytest.fixture(params=[1, 2], ids=lambda halves: f"halves={halves}")
def hopper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Prefills walk in Gluon, with the model, behind interpreted kernels. Fresh memory is NaN."""
    monkeypatch.setattr(gluon_walk, "HALVES", request.param)
    monkeypatch.setattr(triton_recurrent, "run_recurrent", lambda *batch, **known: last_tokens(*batch, **known))
    for module in (triton_state, triton_segments):
        # Fewer tokens than a tile has, which Hopper leaves to Triton, need not have other bits here.
        monkeypatch.setattr(module, "gluon_walk_for", lambda q, *others: gluon_walk if len(q) else None)
    with kernels_run("interpreted"), force_backend("triton"), modelled(gluon_walk) as launched:
        yield
    assert launched


walks = pytest.mark.usefixtures("hopper")


def assert_agrees(ours: Result, run: Run, gates: Gates, shape: Shape) -> None:
    """With the reference in float32: every element, and all together within one rounding of a factor."""
    with force_backend("reference"):
        (truth,) = prefill([Run(Tokens(*(x.float() for x in run.tokens)), run.state)], gates, torch.float32)
    counts = serial.roundings(shape, len(run.tokens.v), *DTYPES)
    for actual, expected in zip(ours, truth, strict=True):
        assert_close(actual, expected, counts)
        assert (actual.float() - expected).norm() <= torch.finfo(torch.bfloat16).eps * expected.norm()


@walks
@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        (ONE_HEAD, [*LENGTHS, *LENGTHS, 2, 65]),
        (ONE_HEAD, [70, 70, 66, 200]),
        (MODEL_SHAPE, [65, 4, 1, 30, 131, 0]),
        (Shape(2, 2, 128, 128), [320, 81, 3]),
    ],
    ids=str,
)
def test_prefill_agrees_with_the_reference(shape: Shape, lengths: list[int]) -> None:
    # The first half has initial states; the last two are padding.
    tokens, gates = random_tokens(shape, sum(lengths), torch.bfloat16), random_gates(shape)
    pool = nan_pool(len(lengths) + 4, shape.state, torch.float32)
    slots, known = distinct_slots(len(lengths), len(pool)), torch.arange(len(lengths)) < len(lengths) // 2
    slots[-2:] = -1
    for slot in slots[(slots >= 0) & known]:
        pool[slot] = random_state(shape, torch.float32)
    before, bytes_before, offsets = pool.clone(), memory(pool).clone(), start_offsets(lengths)
    out = gated_delta_rule_prefill(*tokens, *gates, pool, slots, offsets, known)
    for n, (start, length) in enumerate(zip(offsets.tolist(), lengths, strict=False)):
        rows = slice(start, start + length)
        if slots[n] < 0:
            assert not out[rows].any()
        elif length:
            run = Run(tokens.rows(rows), before[slots[n]] if known[n] else None)
            assert_agrees(Result(out[rows], pool[slots[n]]), run, gates, shape)
    assert only_written(pool, before, bytes_before, slots[(slots >= 0) & (offsets.diff() > 0)])


@walks
@pytest.mark.parametrize("lengths", [[70], [65, 4, 1, 30], [400, 127]], ids=str)
def test_it_rounds_where_the_walk_in_triton_does(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU both have the same bits; here products may sum in another order, which seldom turns a rounding."""
    gates, runs = random_gates(MODEL_SHAPE), random_runs(MODEL_SHAPE, lengths, *DTYPES)
    results = prefill(runs, gates, torch.float32)
    monkeypatch.setattr(triton_state, "gluon_walk_for", lambda *tensors: None)
    for ours, theirs in zip(results, prefill(runs, gates, torch.float32), strict=True):
        for actual, expected in zip(ours, theirs, strict=True):
            error = (actual.float() - expected.float()).norm()
            assert error <= torch.finfo(torch.bfloat16).eps / 16 * expected.float().norm()


@walks
@pytest.mark.parametrize("length", [65, 70, 100, 190])
def test_what_lies_behind_a_sequence_may_be_no_number(length: int) -> None:
    """Tokens of a sequence that is skipped, and of none; outputs of the latter are not written."""
    gates, (run,) = random_gates(ONE_HEAD), random_runs(ONE_HEAD, [length], *DTYPES)
    expected = prefill([run], gates, torch.float32)[0]
    behind = Tokens(*(torch.full((90, *x.shape[1:]), torch.nan, dtype=x.dtype) for x in run.tokens))
    pool, slots = place([run, Run(behind, None)], torch.float32)
    slots, known = slots[:, 0], torch.tensor([True, True])
    slots[1] = -1
    tokens = join([run, Run(behind, None)])
    out = TritonGatedDeltaRule().prefill(*tokens, *gates, pool, slots, start_offsets([length, 70]), known)
    promises.assert_same(Result(out[:length], pool[slots[0]]), expected)
    assert not out[length : length + 70].any()
    assert out[length + 70 :].isnan().all()


@walks
def test_a_prefill_split_at_chunks_has_the_bits_of_the_whole_one() -> None:
    gates = random_gates(ONE_HEAD)
    for length, state in ((65, None), (150, random_state(ONE_HEAD, torch.float32)), (320, None)):
        tokens = random_tokens(ONE_HEAD, length, torch.bfloat16)
        (whole,) = prefill([Run(tokens, state)], gates, torch.float32)
        for cut in range(CHUNK_SIZE, length, CHUNK_SIZE):
            (head,) = prefill([Run(tokens.rows(slice(cut)), state)], gates, torch.float32)
            (tail,) = prefill([Run(tokens.rows(slice(cut, None)), head.state)], gates, torch.float32)
            promises.assert_same(Result(torch.cat([head.out, tail.out]), tail.state), whole)


@walks
def test_a_sequence_does_not_depend_on_the_batch() -> None:
    gates, runs = random_gates(MODEL_SHAPE), random_runs(MODEL_SHAPE, [30, 200, 64, 127], *DTYPES)
    for run, together in zip(runs, prefill(runs, gates, torch.float32), strict=True):
        promises.assert_same(prefill([run], gates, torch.float32)[0], together)


@walks
def test_a_snapshot_equals_a_prefill_of_its_tokens_and_changes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [(0, 0), (30, 0), (64, 0), (64, 64), (65, 64), (70, 64), (70, 64), (197, 128), (320, 192), (320, 320)]
    monkeypatch.setattr(promises, "SNAPSHOTS", lengths)
    promises.test_a_snapshot_equals_a_prefill_of_its_tokens_and_changes_nothing_else("triton", ONE_HEAD, *DTYPES)


@walks
@pytest.mark.parametrize(("length", "cut"), [(70, 64), (70, 0), (128, 128), (64, 0)])
def test_a_snapshot_of_the_only_sequence_equals_a_prefill_of_its_tokens(length: int, cut: int) -> None:
    gates, (run,) = random_gates(MODEL_SHAPE), random_runs(MODEL_SHAPE, [length], *DTYPES)
    pool, slots = place([run], torch.float32, columns=2)
    where = slots[:, 0], start_offsets([length]), torch.tensor([True]), slots[:, 1], torch.tensor([cut])
    out = gated_delta_rule_prefill(*run.tokens, *gates, pool, *where)
    assert_agrees(Result(out, pool[slots[0, 0]]), run, gates, MODEL_SHAPE)
    (head,) = prefill([Run(run.tokens.rows(slice(cut)), run.state)], gates, torch.float32)
    assert same_bits(pool[slots[0, 1]], head.state)


@walks
def test_views_into_wider_rows_are_read_where_they_lie() -> None:
    shape = Shape(2, 2, 128, 128)
    gates, (run,) = random_gates(shape), random_runs(shape, [200], *DTYPES)
    wide = torch.cat([x.flatten(1) for x in run.tokens[:3]], dim=1)
    parts = wide.split([x[0].numel() for x in run.tokens[:3]], dim=1)
    q, k, v = (part.unflatten(1, x.shape[1:]) for part, x in zip(parts, run.tokens, strict=False))
    view = Run(run.tokens._replace(q=q, k=k, v=v), run.state)
    promises.assert_same(prefill([view], gates, torch.float32)[0], prefill([run], gates, torch.float32)[0])


SEGMENT = 2
"""Chunks of a segment below."""
STEP = SEGMENT * CHUNK_SIZE


@walks
@pytest.mark.parametrize(
    ("lengths", "skipped", "cuts"),
    [
        ([400], (), [256]),
        ([64, 384, 256, 90, 130], (2,), [64, 256, 0, 64, 0]),
        ([256, 512, 0], (), [256, 320, 0]),
        ([128, 300], (), [128, 300]),
    ],
    ids=str,
)
def test_segments_have_the_bits_of_the_serial_walk(lengths: list[int], skipped: Sequence[int], cuts: list[int]) -> None:
    """From the states that a serial walk has before them."""
    shape, gates = ONE_HEAD, random_gates(ONE_HEAD)
    runs = random_runs(shape, lengths, *DTYPES)
    pool, slots = place(runs, torch.float32, columns=2)
    slots, snapshot_slots = (column.contiguous() for column in slots.unbind(1))
    slots[list(skipped)] = -1
    tokens, offsets, known = (*join(runs), *gates), start_offsets(lengths), torch.tensor([True] * len(runs))
    starts = torch.full((sum(lengths) // STEP + len(runs), *shape.state), torch.nan)
    for n, run in enumerate(runs):
        for j in range(lengths[n] // STEP + 1):
            (head,) = prefill([Run(run.tokens.rows(slice(j * STEP)), run.state)], gates, torch.float32)
            starts[offsets[n] // STEP + n + j] = head.state
    config = Configuration(shape.key_dim, shape.value_dim, torch.bfloat16, current_target())
    chunks, _ = solve_chunks(tokens, slots, offsets, config)

    def walk(**segments: Any) -> tuple[Tensor, Tensor]:
        out, state = torch.full(tokens[2].shape, torch.nan, dtype=torch.bfloat16), pool.clone()
        snapshots = snapshot_slots, torch.tensor(cuts)
        gluon_walk.run_gluon_walk(tokens, out, state, slots, offsets, known, snapshots, chunks, **segments)
        return out, state

    for ours, theirs in zip(walk(starts=starts, segment=SEGMENT), walk(), strict=True):
        assert same_bits(ours, theirs)


@walks
def test_context_parallelism_agrees_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_segments, "SEGMENT", SEGMENT)
    gates, runs = random_gates(ONE_HEAD), random_runs(ONE_HEAD, [300, 65, 128], *DTYPES)
    with force_backend("triton_context_parallel"):
        results = prefill(runs, gates, torch.float32)
    for run, result in zip(runs, results, strict=True):
        assert_agrees(result, run, gates, ONE_HEAD)
