from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import causal_conv1d_fn, causal_conv1d_update

from qnext_kernels import causal_conv1d_decode, causal_conv1d_prefill, causal_conv1d_verify, force_backend
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
    same_bits,
    start_offsets,
)

CHANNELS = 13
DRAFTS = 3
WIDTHS = (2, 4)
POOLS = ("channels first", "channels last")
STEP_POOLS = ("by rows", "by steps", "shared columns")
STORED = [(x, pool) for x in DTYPES for pool in DTYPES]
SNAPSHOTS = [(0, 0), (1, 0), (1, 1), (2, 1), (3, 3), (63, 62), (64, 64), (65, 2), (197, 0), (197, 100), (197, 197)]
"""Lengths of sequences, and behind how many of their tokens to take a snapshot."""

History = Tensor | None
"""The W − 1 inputs before a sequence's next token, [D, W − 1]; None: it starts here."""


def make_pool(slots: int, width: int, dtype: torch.dtype, layout: str, *, drafts: int = 0) -> Tensor:
    """[slots, D, W − 1 + drafts] of NaN."""
    length = width - 1 + drafts
    if layout == "channels first":
        return nan_pool(slots, (CHANNELS, length), dtype, gap=0)
    return nan_pool(slots, (length, CHANNELS), dtype).transpose(1, 2)


def make_steps(rows: int, width: int, dtype: torch.dtype, layout: str) -> Tensor:
    """[rows, 1 + DRAFTS, D, W − 1] of NaN; with shared columns step t is columns t to t + W − 2 of one buffer a row."""
    steps = 1 + DRAFTS
    if layout != "shared columns":
        return nan_steps(rows, steps, (CHANNELS, width - 1), dtype, steps_first=layout == "by steps")
    columns = steps + width - 2
    buffer = nan_pool(rows, (CHANNELS, columns), dtype)
    return buffer.as_strided((rows, steps, CHANNELS, width - 1), (buffer.stride(0), 1, columns, 1))


def make_weight(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(CHANNELS, width) * width**-0.5).to(dtype)


def roundings(width: int) -> dict[torch.dtype, int]:
    """A sum of W products and SiLU."""
    return {torch.float32: 2 * width + 4}


def prefill(
    weight: Tensor, pool: Tensor, xs: Sequence[Tensor], histories: Sequence[History]
) -> list[tuple[Tensor, Tensor]]:
    """Prefill sequences from the given histories in random slots; each one's outputs and inputs to continue from."""
    width = weight.shape[1] - 1
    slots = distinct_slots(len(xs), len(pool))
    for slot, history in zip(slots, histories, strict=True):
        if history is not None:
            pool[slot, :, :width] = history
    offsets = start_offsets([len(x) for x in xs])
    known = torch.tensor([history is not None for history in histories])
    y = causal_conv1d_prefill(torch.cat(list(xs)), weight, pool, slots, offsets, known)
    outputs = y.split([len(x) for x in xs])
    return [(out, pool[slot, :, :width].clone()) for out, slot in zip(outputs, slots, strict=True)]


def decode(
    weight: Tensor, pool: Tensor, xs: Sequence[Tensor], histories: Sequence[History]
) -> list[tuple[Tensor, Tensor]]:
    """Decode the first token of each sequence."""
    width = weight.shape[1] - 1
    slots = distinct_slots(len(xs), len(pool))
    pool[slots, :, :width] = torch.stack([history for history in histories if history is not None])
    y = causal_conv1d_decode(torch.stack([x[0] for x in xs]), weight, pool, slots)
    return [(y[n : n + 1], pool[slot, :, :width].clone()) for n, slot in enumerate(slots)]


def verify(
    weight: Tensor, pool: Tensor, xs: Sequence[Tensor], histories: Sequence[History]
) -> list[tuple[Tensor, Tensor]]:
    """Verify sequences behind a random number of accepted tokens; the state returned is that behind the last token."""
    width = weight.shape[1] - 1
    slots = distinct_slots(len(xs), len(pool))
    accepted = torch.randint(1, DRAFTS + 2, (len(xs),))
    for slot, history, count in zip(slots, histories, accepted, strict=True):
        assert history is not None
        pool[slot, :, count - 1 : count - 1 + width] = history
    offsets = start_offsets([len(x) for x in xs])
    y = causal_conv1d_verify(torch.cat(list(xs)), weight, pool, slots, offsets, accepted)
    results = []
    for out, slot in zip(y.split([len(x) for x in xs]), slots, strict=True):
        results.append((out, pool[slot, :, len(out) - 1 : len(out) - 1 + width].clone()))
    return results


def past_inputs(count: int, width: int, dtype: torch.dtype, pool_dtype: torch.dtype) -> Tensor:
    """[count, D, W − 1] in the dtype of the pool: values that inputs of ``dtype`` leave in it."""
    return torch.randn(count, CHANNELS, width - 1).to(dtype).to(pool_dtype)


def random_history(width: int, dtype: torch.dtype, pool_dtype: torch.dtype) -> Tensor:
    return past_inputs(1, width, dtype, pool_dtype)[0]


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("layout", POOLS)
@pytest.mark.parametrize(("dtype", "pool_dtype"), STORED)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_prefill_agrees_with_float64(
    backend: str, width: int, dtype: torch.dtype, pool_dtype: torch.dtype, layout: str
) -> None:
    lengths = [*LENGTHS, *LENGTHS, 2, 65]
    x, weight = torch.randn(sum(lengths), CHANNELS).to(dtype), make_weight(width, dtype)
    pool = make_pool(40, width, pool_dtype, layout, drafts=1)
    # Every length with and without earlier inputs; the last two are padding.
    slots, known = distinct_slots(len(lengths), 40), torch.arange(len(lengths)) < len(LENGTHS)
    slots[-2:] = -1
    live = slots >= 0
    filled = slots[live & known]
    pool[filled, :, : width - 1] = past_inputs(len(filled), width, dtype, pool_dtype)
    before, bytes_before = pool.clone(), memory(pool).clone()
    truth_pool, offsets = pool.clone(), start_offsets(lengths)
    with force_backend("reference"):
        truth = causal_conv1d_prefill(x.double(), weight.double(), truth_pool, slots, offsets, known)
    with force_backend(backend):
        y = causal_conv1d_prefill(x, weight, pool, slots, offsets, known)
    assert y.dtype == dtype
    assert_close(y, truth, roundings(width))
    assert torch.equal(y[offsets[-3] :], torch.zeros(67, CHANNELS, dtype=dtype))
    written = slots[live & (offsets.diff() > 0)]
    assert same_bits(pool[written], truth_pool[written])
    assert only_written(pool, before, bytes_before, written)


@pytest.mark.parametrize("layout", POOLS)
@pytest.mark.parametrize(("dtype", "pool_dtype"), STORED)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_verify_agrees_with_float64(
    backend: str, width: int, dtype: torch.dtype, pool_dtype: torch.dtype, layout: str
) -> None:
    lengths = [n % (DRAFTS + 2) for n in range(25)]
    x, weight = torch.randn(sum(lengths), CHANNELS).to(dtype), make_weight(width, dtype)
    pool = make_pool(40, width, pool_dtype, layout, drafts=DRAFTS)
    slots, accepted = distinct_slots(25, 40), torch.randint(1, DRAFTS + 2, (25,), dtype=torch.int32)
    slots[3:6] = -1
    for slot, count in zip(slots[slots >= 0], accepted[slots >= 0], strict=True):
        pool[slot, :, count - 1 : count - 2 + width] = past_inputs(1, width, dtype, pool_dtype)[0]
    before, bytes_before = pool.clone(), memory(pool).clone()
    truth_pool, offsets = pool.clone(), start_offsets(lengths, torch.int64)
    with force_backend("reference"):
        truth = causal_conv1d_verify(x.double(), weight.double(), truth_pool, slots, offsets, accepted)
    with force_backend(backend):
        y = causal_conv1d_verify(x, weight, pool, slots, offsets, accepted)
    assert y.dtype == dtype
    assert_close(y, truth, roundings(width))
    assert not y[offsets[3] : offsets[6]].any()
    written = slots[(slots >= 0) & (offsets.diff() > 0)]
    assert same_bits(pool[written], truth_pool[written])
    assert only_written(pool, before, bytes_before, written)


@pytest.mark.parametrize("layout", POOLS)
@pytest.mark.parametrize(("dtype", "pool_dtype"), STORED)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_decode_agrees_with_float64(
    backend: str, width: int, dtype: torch.dtype, pool_dtype: torch.dtype, layout: str
) -> None:
    x, weight = torch.randn(25, CHANNELS).to(dtype), make_weight(width, dtype)
    pool, slots = make_pool(40, width, pool_dtype, layout, drafts=1), distinct_slots(25, 40)
    slots[3:5] = -1
    live = slots[slots >= 0]
    pool[live, :, : width - 1] = past_inputs(len(live), width, dtype, pool_dtype)
    before, bytes_before, truth_pool = pool.clone(), memory(pool).clone(), pool.clone()
    with force_backend("reference"):
        truth = causal_conv1d_decode(x.double(), weight.double(), truth_pool, slots)
    with force_backend(backend):
        y = causal_conv1d_decode(x, weight, pool, slots)
    assert y.dtype == dtype
    assert_close(y, truth, roundings(width))
    assert not y[3:5].any()
    assert same_bits(pool[live], truth_pool[live])
    assert only_written(pool, before, bytes_before, live)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_prefill_agrees_with_transformers(backend: str, width: int) -> None:
    weight, pool = make_weight(width), make_pool(2, width, torch.float32, "channels first")
    for length in (1, 2, 3, 70):
        x = torch.randn(length, CHANNELS)
        with force_backend(backend):
            ((y, _),) = prefill(weight, pool, [x], [None])
        theirs = causal_conv1d_fn(x.t()[None], weight, None, "silu")
        assert_close(y, theirs[0].t(), roundings(2 * width))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_decode_and_its_state_agree_with_transformers(backend: str, width: int) -> None:
    weight, pool = make_weight(width), make_pool(9, width, torch.float32, "channels last")
    slots, conv_state = distinct_slots(5, 9), torch.randn(5, CHANNELS, width - 1)
    pool[slots] = conv_state
    for _ in range(width + 1):
        x = torch.randn(5, CHANNELS)
        with force_backend(backend):
            y = causal_conv1d_decode(x, weight, pool, slots)
        theirs = causal_conv1d_update(x[:, :, None], conv_state, weight, None, "silu")
        assert_close(y, theirs[:, :, 0], roundings(2 * width))
        assert torch.equal(pool[slots], conv_state)


@pytest.mark.parametrize("layout", POOLS)
@pytest.mark.parametrize(("dtype", "pool_dtype"), STORED)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_verify_equals_repeated_decode_bitwise(
    backend: str, width: int, dtype: torch.dtype, pool_dtype: torch.dtype, layout: str
) -> None:
    weight, pool = make_weight(width, dtype), make_pool(40, width, pool_dtype, layout, drafts=DRAFTS)
    xs = [torch.randn(1 + n % (DRAFTS + 1), CHANNELS).to(dtype) for n in range(12)]
    histories = [random_history(width, dtype, pool_dtype) for _ in xs]
    with force_backend(backend):
        for x, history, verified in zip(xs, histories, verify(weight, pool, xs, histories), strict=True):
            outputs, state = [], history
            for token in x:
                ((y, state),) = decode(weight, pool, [token[None]], [state])
                outputs.append(y)
            assert_same(verified, (torch.cat(outputs), state))


@pytest.mark.parametrize("layout", POOLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_tokens_that_were_not_accepted_leave_no_trace(
    backend: str, width: int, dtype: torch.dtype, layout: str
) -> None:
    weight = make_weight(width, dtype)
    pool = make_pool(9, width, dtype, layout, drafts=DRAFTS)
    control_pool = make_pool(9, width, dtype, layout)
    slots = distinct_slots(6, 9)
    states = [random_history(width, dtype, dtype) for _ in slots]
    pool[slots, :, : width - 1] = torch.stack(states)
    accepted = torch.ones(6, dtype=torch.int64)
    with force_backend(backend):
        for _ in range(6):
            lengths = torch.randint(1, DRAFTS + 2, (6,))
            xs = torch.randn(int(lengths.sum()), CHANNELS).to(dtype).split(lengths.tolist())
            offsets = start_offsets(lengths.tolist())
            verified = causal_conv1d_verify(torch.cat(xs), weight, pool, slots, offsets, accepted)
            accepted = (torch.rand(6) * lengths).long() + 1
            for n, y in enumerate(verified.split(lengths.tolist())):
                for t in range(int(accepted[n])):
                    ((expected, states[n]),) = decode(weight, control_pool, [xs[n][t : t + 1]], [states[n]])
                    assert same_bits(y[t : t + 1], expected)


@pytest.mark.parametrize("run", [prefill, decode, verify])
@pytest.mark.parametrize("layout", POOLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_a_sequence_does_not_depend_on_the_batch_bitwise(
    backend: str, dtype: torch.dtype, layout: str, run: Callable[..., list[tuple[Tensor, Tensor]]]
) -> None:
    weight, pool = make_weight(4, dtype), make_pool(40, 4, dtype, layout, drafts=DRAFTS)
    longest = {prefill: max(LENGTHS), decode: 1, verify: DRAFTS + 1}[run]
    lengths = [length for length in LENGTHS * 25 if 0 < length <= longest]
    xs = [torch.randn(length, CHANNELS).to(dtype) for length in lengths[:25]]
    histories = [random_history(4, dtype, dtype) for _ in xs]
    order = torch.randperm(25).tolist()
    with force_backend(backend):
        together = run(weight, pool, xs, histories)
        shuffled = run(weight, pool, [xs[n] for n in order], [histories[n] for n in order])
        for n, other in zip(order, shuffled, strict=True):
            assert_same(other, together[n])
            assert_same(run(weight, pool, [xs[n]], [histories[n]])[0], together[n])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("layout", POOLS)
@pytest.mark.parametrize(("dtype", "pool_dtype"), STORED)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_a_channel_does_not_depend_on_the_others_bitwise(
    backend: str, dtype: torch.dtype, pool_dtype: torch.dtype, layout: str
) -> None:
    # More channels than a backend takes at once, and tokens enough to share between threads.
    channels, lengths = 1045, [70, 1, 2, 0, 61]
    inputs = torch.randn(sum(lengths), channels).to(dtype), (torch.randn(channels, 4) / 2).to(dtype)
    pool = torch.randn(9, channels, 3 + DRAFTS).to(dtype).to(pool_dtype)
    if layout == "channels last":
        pool = pool.transpose(1, 2).contiguous().transpose(1, 2)
    slots, rest = distinct_slots(5, 9), (start_offsets(lengths), torch.arange(5) % 2 > 0)
    accepted = torch.randint(1, DRAFTS + 2, (5,))

    def run(part: slice) -> list[Tensor]:
        x, weight, state = inputs[0][:, part], inputs[1][part], pool.clone()[:, part]
        y = causal_conv1d_prefill(x, weight, state, slots, *rest)
        verified = causal_conv1d_verify(x[:5], weight, state, slots, torch.arange(6), accepted)
        return [y, verified, causal_conv1d_decode(x[:5], weight, state, slots), state.transpose(1, 2)]

    with force_backend(backend):
        whole = run(slice(channels))
        for part in (slice(5), slice(3, 40), slice(500, 1045)):
            for alone, together in zip(run(part), whole, strict=True):
                assert same_bits(alone, together[..., part])


@pytest.mark.parametrize("given", ["weight", "conv_state"])
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_float16_is_served(backend: str, given: str) -> None:
    x, weight, pool = torch.randn(5, CHANNELS), make_weight(4), torch.randn(9, CHANNELS, 3)
    if given == "weight":
        weight = weight.half()
    else:
        pool = pool.half()
    slots, truth_pool = distinct_slots(5, 9), pool.clone()
    with force_backend("reference"):
        truth = causal_conv1d_decode(x.double(), weight.double(), truth_pool, slots)
    with force_backend(backend):
        y = causal_conv1d_decode(x, weight, pool, slots)
    assert_close(y, truth, roundings(4))
    assert same_bits(pool, truth_pool)


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_verify_into_an_empty_step_pool_only_reads_the_state(backend: str) -> None:
    weight, pool = make_weight(4), torch.randn(9, CHANNELS, 3)
    x, slots, before = torch.randn(6, CHANNELS), distinct_slots(3, 9), pool.clone()
    where = (slots, start_offsets([1, 2, 3]), torch.ones(3, dtype=torch.int64))
    with force_backend(backend):
        y = causal_conv1d_verify(
            x, weight, pool, *where, make_steps(0, 4, torch.float32, "by rows"), -torch.ones(3).int()
        )
        expected = causal_conv1d_prefill(x, weight, before.clone(), *where[:2], torch.ones(3, dtype=torch.bool))
    assert same_bits(y, expected)
    assert same_bits(pool, before)


@pytest.mark.parametrize(("dtype", "pool_dtype"), STORED)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_prefill_split_anywhere_equals_unsplit_bitwise(
    backend: str, width: int, dtype: torch.dtype, pool_dtype: torch.dtype
) -> None:
    weight, pool = make_weight(width, dtype), make_pool(9, width, pool_dtype, "channels last")
    x = torch.randn(11, CHANNELS).to(dtype)
    with force_backend(backend):
        for history in (None, random_history(width, dtype, pool_dtype)):
            (whole,) = prefill(weight, pool, [x], [history])
            for cut in range(1, len(x)):
                ((head, state),) = prefill(weight, pool, [x[:cut]], [history])
                ((tail, state),) = prefill(weight, pool, [x[cut:]], [state])
                assert_same((torch.cat([head, tail]), state), whole)


@pytest.mark.parametrize(("dtype", "pool_dtype"), STORED)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_prefill_of_few_tokens_equals_verify_and_of_one_equals_decode_bitwise(
    backend: str, width: int, dtype: torch.dtype, pool_dtype: torch.dtype
) -> None:
    weight, pool = make_weight(width, dtype), make_pool(40, width, pool_dtype, "channels last", drafts=DRAFTS)
    xs = [torch.randn(1 + n % (DRAFTS + 1), CHANNELS).to(dtype) for n in range(8)]
    histories = [random_history(width, dtype, pool_dtype) for _ in xs]
    with force_backend(backend):
        prefilled = prefill(weight, pool, xs, histories)
        for ours, verified in zip(prefilled, verify(weight, pool, xs, histories), strict=True):
            assert_same(ours, verified)
        for ours, x, decoded in zip(prefilled, xs, decode(weight, pool, xs, histories), strict=True):
            if len(x) == 1:
                assert_same(ours, decoded)


@pytest.mark.parametrize("layout", POOLS)
@pytest.mark.parametrize(("dtype", "pool_dtype"), STORED)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_a_snapshot_equals_a_prefill_of_its_tokens_and_changes_nothing_else_bitwise(
    backend: str, width: int, dtype: torch.dtype, pool_dtype: torch.dtype, layout: str
) -> None:
    # Every sequence with and without earlier inputs.
    lengths, cuts = (list(values) for values in zip(*SNAPSHOTS, *SNAPSHOTS, strict=True))
    count, known = len(lengths), torch.arange(len(lengths)) < len(SNAPSHOTS)
    weight, pool = make_weight(width, dtype), make_pool(60, width, pool_dtype, layout, drafts=1)
    xs = [torch.randn(length, CHANNELS).to(dtype) for length in lengths]
    histories = [random_history(width, dtype, pool_dtype) if earlier else None for earlier in known]
    slots, snapshot_slots = distinct_slots(2 * count, 60).view(2, count)
    slots[-1] = snapshot_slots[-2] = snapshot_slots[3] = -1
    for slot, history in zip(slots, histories, strict=True):
        if history is not None:
            pool[slot, :, : width - 1] = history
    before, bytes_before, plain = pool.clone(), memory(pool).clone(), pool.clone()
    arguments = (slots, start_offsets(lengths), known)
    snapshot_lengths = torch.tensor(cuts)
    snapshot_lengths[-2] = 999
    with force_backend(backend):
        expected = prefill(
            weight,
            make_pool(60, width, pool_dtype, layout),
            [x[:cut] for x, cut in zip(xs, cuts, strict=True)],
            histories,
        )
        y_plain = causal_conv1d_prefill(torch.cat(xs), weight, plain, *arguments)
        y = causal_conv1d_prefill(torch.cat(xs), weight, pool, *arguments, snapshot_slots, snapshot_lengths)
    taken = (slots >= 0) & (snapshot_slots >= 0)
    for n in taken.nonzero().flatten():
        state = expected[n][1] if cuts[n] or known[n] else torch.zeros(CHANNELS, width - 1, dtype=pool_dtype)
        assert same_bits(pool[snapshot_slots[n], :, : width - 1], state)
    assert same_bits(y, y_plain)
    assert same_bits(pool[slots[slots >= 0]], plain[slots[slots >= 0]])
    assert pool[:, :, width - 1 :].isnan().all()
    written = torch.cat([slots[slots >= 0], snapshot_slots[taken]])
    assert only_written(pool, before, bytes_before, written)


@pytest.mark.parametrize("drafts", [0, DRAFTS])
@pytest.mark.parametrize("layout", STEP_POOLS)
@pytest.mark.parametrize(("dtype", "pool_dtype"), STORED)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_verify_with_a_step_pool_equals_repeated_decode_and_only_reads_the_state_bitwise(
    backend: str, width: int, dtype: torch.dtype, pool_dtype: torch.dtype, layout: str, drafts: int
) -> None:
    weight, pool = make_weight(width, dtype), make_pool(20, width, pool_dtype, "channels last", drafts=drafts)
    lengths = [n % (DRAFTS + 2) for n in range(15)]
    xs = [torch.randn(length, CHANNELS).to(dtype) for length in lengths]
    histories = [random_history(width, dtype, pool_dtype) for _ in xs]
    slots, rows, accepted = distinct_slots(15, 20), distinct_slots(15, 17), torch.randint(1, drafts + 2, (15,))
    for slot, history, offset in zip(slots, histories, (accepted - 1).tolist(), strict=True):
        pool[slot, :, offset : offset + width - 1] = history
    slots[3], rows[8] = -1, -1
    before = memory(pool).clone()
    steps, expected = (make_steps(17, width, pool_dtype, layout) for _ in range(2))
    control_pool = make_pool(3, width, pool_dtype, "channels first")
    with force_backend(backend):
        y = causal_conv1d_verify(torch.cat(xs), weight, pool, slots, start_offsets(lengths), accepted, steps, rows)
        for n, out in enumerate(y.split(lengths)):
            if slots[n] < 0:
                assert not out.any()
                continue
            state = histories[n]
            for t in range(lengths[n]):
                ((decoded, state),) = decode(weight, control_pool, [xs[n][t : t + 1]], [state])
                assert same_bits(out[t : t + 1], decoded)
                if rows[n] >= 0:
                    expected[rows[n], t] = state
    assert torch.equal(memory(steps), memory(expected))
    assert torch.equal(memory(pool), before)


@pytest.mark.parametrize("layout", STEP_POOLS)
@pytest.mark.parametrize(("dtype", "pool_dtype"), STORED)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_verify_with_a_step_pool_agrees_with_verify_in_place_bitwise_and_with_float64(
    backend: str, width: int, dtype: torch.dtype, pool_dtype: torch.dtype, layout: str
) -> None:
    weight, pool = make_weight(width, dtype), make_pool(20, width, pool_dtype, "channels first", drafts=DRAFTS)
    pool.copy_(past_inputs(20, width + DRAFTS, dtype, pool_dtype))
    lengths = [1 + n % (DRAFTS + 1) for n in range(15)]
    x, slots, rows = torch.randn(sum(lengths), CHANNELS).to(dtype), distinct_slots(15, 20), distinct_slots(15, 17)
    where = (slots, start_offsets(lengths), torch.randint(1, DRAFTS + 2, (15,)))
    steps, truth_steps = (make_steps(17, width, pool_dtype, layout) for _ in range(2))
    with force_backend("reference"):
        truth = causal_conv1d_verify(x.double(), weight.double(), pool, *where, truth_steps, rows)
    with force_backend(backend):
        y = causal_conv1d_verify(x, weight, pool, *where, steps, rows)
        y_in_place = causal_conv1d_verify(x, weight, pool, *where)
    assert same_bits(y, y_in_place)
    for slot, row, length in zip(slots, rows, lengths, strict=True):
        for t in range(length):
            assert same_bits(steps[row, t], pool[slot, :, t : t + width - 1])
    assert_close(y, truth, roundings(width))
    assert torch.equal(memory(steps), memory(truth_steps))


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_an_empty_batch_is_served(backend: str) -> None:
    weight, pool = make_weight(4), make_pool(3, 4, torch.float32, "channels first")
    steps = make_steps(3, 4, torch.float32, "shared columns")
    x, none = torch.empty(0, CHANNELS), torch.empty(0, dtype=torch.int32)
    with force_backend(backend):
        assert causal_conv1d_decode(x, weight, pool, none).shape == x.shape
        assert causal_conv1d_verify(x, weight, pool, none, start_offsets([]), none).shape == x.shape
        assert causal_conv1d_verify(x, weight, pool, none, start_offsets([]), none, steps, none).shape == x.shape
        for snapshots in ((), (none, none)):
            rest = (none, start_offsets([]), none.bool(), *snapshots)
            assert causal_conv1d_prefill(x, weight, pool, *rest).shape == x.shape
    assert pool.isnan().all()
    assert steps.isnan().all()


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "prefill": causal_conv1d_prefill,
    "prefill with snapshots": causal_conv1d_prefill,
    "verify": causal_conv1d_verify,
    "verify with steps": causal_conv1d_verify,
    "decode": causal_conv1d_decode,
}
BAD_ANYWHERE = [
    Bad("x", "one dimension", lambda x: x[0], ValueError),
    Bad("x", "integers", lambda x: x.long(), TypeError),
    Bad("weight", "of other channels", lambda x: x[:-1], ValueError),
    Bad("weight", "integers", lambda x: x.long(), TypeError),
    Bad("conv_state", "of other channels", lambda x: x[:, :-1], ValueError),
    Bad("conv_state", "too short", lambda x: x[:, :, :2], ValueError),
    Bad("conv_state", "integers", lambda x: x.int(), TypeError),
    Bad("slots", "of fewer sequences", lambda x: x[:-1], ValueError),
    Bad("slots", "floats", lambda x: x.float(), TypeError),
    Bad("slots", "beyond the pool", lambda x: x + 9, IndexError),
    Bad("slots", "below −1", lambda x: x - 12, IndexError),
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
    Bad("num_accepted_tokens", "of fewer sequences", lambda x: x[:-1], ValueError),
    Bad("num_accepted_tokens", "floats", lambda x: x.float(), TypeError),
    Bad("num_accepted_tokens", "zero", lambda x: x - 1, IndexError),
    Bad("num_accepted_tokens", "more than the drafts", lambda x: x + DRAFTS + 1, IndexError),
    Bad("query_start_loc", "more tokens than the state holds", lambda x: x * torch.tensor([0, 0, 0, 1]), ValueError),
]
BAD_SNAPSHOTS = [
    Bad("snapshot_slots", "missing", lambda x: None, ValueError),
    Bad("snapshot_slots", "of fewer sequences", lambda x: x[:-1], ValueError),
    Bad("snapshot_slots", "floats", lambda x: x.float(), TypeError),
    Bad("snapshot_slots", "beyond the pool", lambda x: x + 9, IndexError),
    Bad("snapshot_slots", "below −1", lambda x: x - 12, IndexError),
    Bad("snapshot_lengths", "missing", lambda x: None, ValueError),
    Bad("snapshot_lengths", "of fewer sequences", lambda x: x[:-1], ValueError),
    Bad("snapshot_lengths", "floats", lambda x: x.float(), TypeError),
    Bad("snapshot_lengths", "below 0", lambda x: x - 3, ValueError),
    Bad("snapshot_lengths", "beyond the sequence", lambda x: x + 1, ValueError),
]
BAD_STEPS = [
    Bad("step_state", "missing", lambda x: None, ValueError),
    Bad("step_state", "one row", lambda x: x[0], ValueError),
    Bad("step_state", "of other channels", lambda x: x[:, :, :-1], ValueError),
    Bad("step_state", "too short", lambda x: x[:, :, :, 1:], ValueError),
    Bad("step_state", "another float dtype", lambda x: x.double(), TypeError),
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
    pool = make_pool(9, 4, torch.float32, "channels first", drafts=DRAFTS)
    pool.normal_()
    lengths = [1, 1, 1] if operation == "decode" else [1, 2, 3]
    arguments: dict[str, Any] = {
        "x": torch.randn(sum(lengths), CHANNELS),
        "weight": make_weight(4),
        "conv_state": pool,
        "slots": distinct_slots(3, 9),
    }
    if operation != "decode":
        arguments["query_start_loc"] = start_offsets(lengths)
    if operation.startswith("prefill"):
        arguments["has_initial_state"] = torch.tensor([True, False, True])
    if operation.startswith("verify"):
        arguments["num_accepted_tokens"] = torch.tensor([1, 1, 1])
    if operation == "prefill with snapshots":
        arguments["slots"], arguments["snapshot_slots"] = distinct_slots(6, 9).view(2, 3)
        arguments["snapshot_lengths"] = torch.tensor([1, 0, 2])
    steps = make_steps(5, 4, torch.float32, "by rows")[:, :3]
    if operation == "verify with steps":
        arguments["step_state"], arguments["step_rows"] = steps, distinct_slots(3, 5)
    before = memory(pool).clone()
    with pytest.raises(bad.error, match=f"^{bad.argument}:"):
        OPERATIONS[operation](**(arguments | {bad.argument: bad.change(arguments[bad.argument])}))
    assert torch.equal(memory(pool), before)
    assert steps.isnan().all()
