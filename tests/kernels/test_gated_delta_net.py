"""Decode, verify and prefill of a Gated DeltaNet layer, where its operations are called one after the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext_kernels import (
    causal_conv1d_decode,
    causal_conv1d_prefill,
    causal_conv1d_verify,
    force_backend,
    gated_delta_net_decode,
    gated_delta_net_prefill,
    gated_delta_net_verify,
    gated_delta_rule_decode,
    gated_delta_rule_prefill,
    gated_delta_rule_verify,
    gated_rms_norm,
)
from qnext_kernels.dispatch import BackendError, deterministic
from qnext_kernels.gated_delta_net import _one_kernel, _run_native
from tests.kernels import delta_net_runs as runs_of
from tests.kernels.delta_net_runs import (
    EPS,
    Layer,
    Pools,
    Result,
    empty_pools,
    empty_steps,
    join,
    random_layer,
    random_runs,
)
from tests.kernels.delta_rule_runs import COLUMNS, Shape
from tests.kernels.kernel_inputs import NATIVE_BACKENDS, Bad, distinct_slots, same_bits, start_offsets

SHAPE = Shape(2, 3, 16, 12)
DTYPES = (torch.bfloat16, torch.bfloat16, torch.float32)
every_backend = pytest.mark.parametrize("backend", NATIVE_BACKENDS)


def head_by_head(qkvz: Tensor, ba: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The channels of the convolution [T, D], z [T, HV, V], a and b [T, HV], gathered in plain loops."""
    parts: dict[str, list[Tensor]] = {name: [] for name in "qkvzba"}
    for head in range(shape.key_heads):
        names = ["q", "k", *("v" * shape.group), *("z" * shape.group)]
        widths = [shape.key_dim] * 2 + [shape.value_dim] * 2 * shape.group
        for name, part in zip(names, qkvz[:, head].split(widths, dim=1), strict=True):
            parts[name].append(part)
        for name, part in zip("b" * shape.group + "a" * shape.group, ba[:, head].unbind(1), strict=True):
            parts[name].append(part)
    mixed = torch.cat([*parts["q"], *parts["k"], *parts["v"]], dim=1)
    return mixed, torch.stack(parts["z"], dim=1), torch.stack(parts["a"], dim=1), torch.stack(parts["b"], dim=1)


def split(convolved: Tensor, shape: Shape) -> list[Tensor]:
    keys = shape.key_heads * shape.key_dim
    q, k, v = convolved.split([keys, keys, shape.value_heads * shape.value_dim], dim=1)
    heads = ((q, shape.key_heads), (k, shape.key_heads), (v, shape.value_heads))
    return [x.unflatten(1, (count, -1)) for x, count in heads]


def decode_by_operations(qkvz: Tensor, ba: Tensor, layer: Layer, pools: Pools, slots: Tensor, shape: Shape) -> Tensor:
    mixed, z, a, b = head_by_head(qkvz, ba, shape)
    convolved = causal_conv1d_decode(mixed, layer.conv_weight, pools.conv, slots)
    rule = layer.A_log, layer.dt_bias, pools.state, slots
    out = gated_delta_rule_decode(*split(convolved, shape), a, b, *rule)
    return gated_rms_norm(out, z, layer.norm_weight, EPS).flatten(1)


def verify_by_operations(
    qkvz: Tensor, ba: Tensor, layer: Layer, pools: Pools, where: Sequence[Tensor], steps: Sequence[Tensor], shape: Shape
) -> Tensor:
    """``where``: slots, starts and accepted tokens; ``steps``: the step pools and their rows, or nothing."""
    slots, *offsets = where
    conv_steps, rule_steps = (steps[::2], steps[1:]) if steps else ((), ())
    mixed, z, a, b = head_by_head(qkvz, ba, shape)
    convolved = causal_conv1d_verify(mixed, layer.conv_weight, pools.conv, slots[:, 0], *offsets, *conv_steps)
    rule = layer.A_log, layer.dt_bias, pools.state, slots, *offsets, *rule_steps
    out = gated_delta_rule_verify(*split(convolved, shape), a, b, *rule)
    return gated_rms_norm(out, z, layer.norm_weight, EPS).flatten(1)


def filled(*pools: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each pool with random content, and a copy of the same strides."""
    for pool in pools:
        pool.normal_()
        copy = torch.empty_strided(pool.shape, pool.stride(), dtype=pool.dtype)
        yield pool, copy.copy_(pool)


@every_backend
@pytest.mark.parametrize("with_steps", [False, True])
def test_verify_is_the_operations_one_after_the_other(backend: str, with_steps: bool) -> None:
    layer, lengths = random_layer(SHAPE), [1, 3, COLUMNS]
    qkvz, ba = join(random_runs(SHAPE, lengths, *DTYPES))
    slots = distinct_slots(3 * COLUMNS, 15).view(3, COLUMNS)
    where = slots, start_offsets(lengths), torch.tensor([1, COLUMNS, 2])
    ours, theirs = map(Pools._make, zip(*filled(*empty_pools(SHAPE, 15, COLUMNS - 1, DTYPES[1:])), strict=True))
    steps = empty_steps(SHAPE, 5, DTYPES[1:]) if with_steps else ()
    our_steps, their_steps = ([pool.clone() for pool in steps] for _ in range(2))
    rows = [torch.tensor([3, -1, 0])] if with_steps else []
    with force_backend(backend):
        out = gated_delta_net_verify(qkvz, ba, *layer, EPS, *ours, *where, *our_steps, *rows)
        expected = verify_by_operations(qkvz, ba, layer, theirs, where, [*their_steps, *rows], SHAPE)
    for actual, want in zip((out, *ours, *our_steps), (expected, *theirs, *their_steps), strict=True):
        assert same_bits(actual, want)


@every_backend
@pytest.mark.parametrize("with_snapshots", [False, True])
def test_prefill_is_the_operations_one_after_the_other(backend: str, with_snapshots: bool) -> None:
    layer, lengths = random_layer(SHAPE), [1, 70, 5]
    qkvz, ba = join(random_runs(SHAPE, lengths, *DTYPES))
    where = distinct_slots(3, 15), start_offsets(lengths), torch.tensor([True, False, True])
    if with_snapshots:
        where += torch.tensor([-1, 14, -1]), torch.tensor([0, 64, 0])
        where[0].copy_(torch.tensor([2, 0, 9]))
    before = empty_pools(SHAPE, 15, COLUMNS - 1, DTYPES[1:])
    for pool in before:
        pool.normal_()
    ours, theirs = (Pools(*(pool.clone() for pool in before)) for _ in range(2))
    mixed, z, a, b = head_by_head(qkvz, ba, SHAPE)
    with force_backend(backend):
        out = gated_delta_net_prefill(qkvz, ba, *layer, EPS, *ours, *where)
        convolved = causal_conv1d_prefill(mixed, layer.conv_weight, theirs.conv, *where)
        rule = layer.A_log, layer.dt_bias, theirs.state, *where
        expected = gated_delta_rule_prefill(*split(convolved, SHAPE), a, b, *rule)
        expected = gated_rms_norm(expected, z, layer.norm_weight, EPS).flatten(1)
    for actual, want in zip((out, *ours), (expected, *theirs), strict=True):
        assert same_bits(actual, want)


@every_backend
def test_decode_is_the_operations_one_after_the_other(backend: str) -> None:
    layer = random_layer(SHAPE)
    qkvz, ba = join(random_runs(SHAPE, [1] * 4, *DTYPES))
    slots = torch.tensor([4, -1, 0, 2])
    ours, theirs = map(Pools._make, zip(*filled(*empty_pools(SHAPE, 5, 0, DTYPES[1:])), strict=True))
    with force_backend(backend):
        out = gated_delta_net_decode(qkvz, ba, *layer, EPS, *ours, slots)
        expected = decode_by_operations(qkvz, ba, layer, theirs, slots, SHAPE)
    for actual, want in zip((out, *ours), (expected, *theirs), strict=True):
        assert same_bits(actual, want)


@every_backend
@pytest.mark.parametrize("call", ["decode", "prefill", "verify"])
def test_a_destination_gets_the_result_and_nothing_around_it_is_written(backend: str, call: str) -> None:
    layer = random_layer(SHAPE)
    lengths = [1] * 3 if call == "decode" else [1, 3, COLUMNS]
    qkvz, ba = join(random_runs(SHAPE, lengths, *DTYPES))
    slots, starts = distinct_slots(3 * COLUMNS, 15).view(3, COLUMNS), start_offsets(lengths)
    functions: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "decode": (gated_delta_net_decode, (slots[:, 0],)),
        "prefill": (gated_delta_net_prefill, (slots[:, 0], starts, torch.tensor([True, False, True]))),
        "verify": (gated_delta_net_verify, (slots, starts, torch.tensor([1, COLUMNS, 2]))),
    }
    function, where = functions[call]
    before = empty_pools(SHAPE, 15, COLUMNS - 1, DTYPES[1:])
    for pool in before:
        pool.normal_()
    whole = torch.full((len(qkvz) + 3, SHAPE.value_heads * SHAPE.value_dim), math.nan, dtype=DTYPES[0])
    out = whole[2:-1]
    with force_backend(backend):
        expected = function(qkvz, ba, *layer, EPS, *(pool.clone() for pool in before), *where)
        assert function(qkvz, ba, *layer, EPS, *(pool.clone() for pool in before), *where, out=out) is out
    assert same_bits(out, expected)
    assert whole[[0, 1, -1]].isnan().all()


@every_backend
def test_verify_equals_repeated_decode(backend: str) -> None:
    layer, runs = random_layer(SHAPE), random_runs(SHAPE, [1, 2, COLUMNS], *DTYPES)
    with force_backend(backend):
        for call in (runs_of.verify, runs_of.verify_into_steps):
            for run, verified in zip(runs, call(gated_delta_net_verify, SHAPE, layer, runs), strict=True):
                expected: Result = runs_of.repeated_decode(gated_delta_net_decode, SHAPE, layer, run)
                for actual, want in zip(verified, expected, strict=True):
                    assert same_bits(actual, want)


NATIVE_SHAPES = [SHAPE, Shape(1, 5, 128, 128), Shape(3, 1, 40, 33)]
"""Among them: rows of whole vectors and others, values of a key head that are more than a block of channels."""


@pytest.mark.parametrize("pool", ["channels first", "channels last", "more columns"])
@pytest.mark.parametrize("dtypes", list(itertools.product((torch.float32, torch.bfloat16), repeat=3)), ids=str)
@pytest.mark.parametrize("shape", NATIVE_SHAPES, ids=str)
def test_one_native_call_has_the_bits_of_its_operations(
    shape: Shape, dtypes: tuple[torch.dtype, ...], pool: str
) -> None:
    layer = Layer(*(x.to(dtypes[0]) for x in random_layer(shape)))
    drafts = 2 if pool == "more columns" else 0
    layout = {"channels_last": pool == "channels last"}
    # Views of wider projections, as random_runs makes them.
    (run,) = random_runs(shape, [12], *dtypes)
    slots = torch.tensor([4, -1, 0, 2, *range(5, 13)], dtype=torch.int32)
    ours, theirs = map(Pools._make, zip(*filled(*empty_pools(shape, 14, drafts, dtypes[1:], **layout)), strict=True))
    with force_backend("native"):
        out = gated_delta_net_decode(run.qkvz, run.ba, *layer, EPS, *ours, slots)
        expected = decode_by_operations(run.qkvz, run.ba, layer, theirs, slots, shape)
    for actual, want in zip((out, *ours), (expected, *theirs), strict=True):
        assert same_bits(actual, want)

    lengths = [1, 3, 0, COLUMNS, 2, 2]
    (run,) = random_runs(shape, [sum(lengths)], *dtypes)
    slots = torch.cat([distinct_slots(5 * COLUMNS, 21).view(5, COLUMNS), -torch.ones(1, COLUMNS, dtype=torch.int32)])
    slots[0, 1:] = -1
    pools = empty_pools(shape, 21, COLUMNS - 1, dtypes[1:], **layout)
    steps = empty_steps(shape, 7, (dtypes[1], dtypes[2]))
    rows = torch.tensor([3, -1, 0, 6, 1, 2])
    where = slots, start_offsets(lengths), torch.tensor([1, COLUMNS, 1, 2, 1, 1])
    ours, theirs = map(Pools._make, zip(*filled(*pools), strict=True))
    our_steps, their_steps = zip(*filled(*steps), strict=True)
    for with_steps in (False, True):
        our_added, their_added = ((*our_steps, rows), (*their_steps, rows)) if with_steps else ((), ())
        with force_backend("native"):
            out = gated_delta_net_verify(run.qkvz, run.ba, *layer, EPS, *ours, *where, *our_added)
            expected = verify_by_operations(run.qkvz, run.ba, layer, theirs, where, their_added, shape)
        for actual, want in zip((out, *ours, *our_steps), (expected, *theirs, *their_steps), strict=True):
            assert same_bits(actual, want)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_number_of_threads_changes_no_bit_of_the_native_result(tokens: int) -> None:
    # Enough of everything for every part of the call to be shared.
    shape, sequences = Shape(4, 2, 64, 64), 70
    layer = random_layer(shape)
    qkvz, ba = join(random_runs(shape, [tokens] * sequences, *DTYPES))
    slots = torch.randperm(sequences * tokens).view(sequences, tokens)
    pools, copies = zip(*filled(*empty_pools(shape, sequences * tokens, tokens - 1, DTYPES[1:])), strict=True)
    where = [slots, torch.arange(sequences + 1) * tokens, torch.ones(sequences, dtype=torch.int32)]
    with force_backend("native"):
        two = gated_delta_net_verify(qkvz, ba, *layer, EPS, *pools, *where)
        torch.set_num_threads(1)
        one = gated_delta_net_verify(qkvz, ba, *layer, EPS, *copies, *where)
    for actual, want in zip((two, *pools), (one, *copies), strict=True):
        assert same_bits(actual, want)


@pytest.mark.parametrize(
    ("backends", "changed", "serves"),
    [
        ("native", {}, _run_native),
        ("native", {"A_log": torch.Tensor.half}, None),
        ("native", {"state": lambda state: state.transpose(2, 3)}, None),
        ("native,gated_norm=cpu", {}, None),
        ("cpu", {}, None),
    ],
)
def test_one_native_call_serves_where_all_three_operations_are_native(
    backends: str, changed: dict[str, Callable[[Tensor], Tensor]], serves: Callable[..., Tensor] | None
) -> None:
    shape = Shape(2, 3, 16, 16)
    ((qkvz, ba, *_),) = random_runs(shape, [2], *DTYPES)
    pools = empty_pools(shape, 3, 0, DTYPES[1:])
    tensors = random_layer(shape)._asdict() | {"conv_state": pools.conv, "state": pools.state}
    for name, change in changed.items():
        tensors[name] = change(tensors[name])
    *layer, conv_state, state = tensors.values()
    with force_backend(backends):
        assert _one_kernel(qkvz, ba, tuple(layer), conv_state, state) is serves


@every_backend
def test_a_state_that_is_rounded_is_refused_in_the_deterministic_mode_before_anything_is_written(backend: str) -> None:
    ((qkvz, ba, *_),) = random_runs(SHAPE, [2], *DTYPES)
    pools = empty_pools(SHAPE, 3, 0, (torch.bfloat16, torch.bfloat16))
    with (
        force_backend(backend),
        deterministic(),
        pytest.raises(BackendError, match=r"^gated_delta_rule: a state in torch\.bfloat16"),
    ):
        gated_delta_net_decode(qkvz, ba, *random_layer(SHAPE), EPS, *pools, torch.tensor([0, 1]))
    assert pools.conv.isnan().all()


def test_a_snapshot_inside_a_chunk_is_refused_before_anything_is_written() -> None:
    ((qkvz, ba, *_),) = random_runs(SHAPE, [70], *DTYPES)
    pools = empty_pools(SHAPE, 3, 0, DTYPES[1:])
    where = torch.tensor([0]), torch.tensor([0, 70]), torch.tensor([False]), torch.tensor([1]), torch.tensor([63])
    with pytest.raises(ValueError, match=r"^snapshot_lengths: expected multiples of 64"):
        gated_delta_net_prefill(qkvz, ba, *random_layer(SHAPE), EPS, *pools, *where)
    assert pools.conv.isnan().all()


BAD = [
    Bad("qkvz", "two dimensions", lambda x: x.flatten(1), ValueError),
    Bad("qkvz", "key heads that do not divide the value heads", lambda x: x[:, [0, 1, 1, 0]], ValueError),
    Bad("qkvz", "a column too many", lambda x: torch.cat([x, x[:, :, :1]], dim=2), ValueError),
    Bad("qkvz", "integers", lambda x: x.int(), TypeError),
    Bad("ba", "of fewer tokens", lambda x: x[1:], ValueError),
    Bad("ba", "of another group", lambda x: x[:, :, 1:], ValueError),
    Bad("conv_weight", "of fewer channels", lambda x: x[1:], ValueError),
    Bad("conv_weight", "no inputs", lambda x: x[:, :0], ValueError),
    Bad("A_log", "of fewer heads", lambda x: x[1:], ValueError),
    Bad("dt_bias", "integers", lambda x: x.long(), TypeError),
    Bad("norm_weight", "too short", lambda x: x[1:], ValueError),
    Bad("conv_state", "too short a window", lambda x: x[:, :, :2], ValueError),
    Bad("state", "of one slot", lambda x: x[0], ValueError),
    Bad("slots", "behind the last", lambda x: x + 15, IndexError),
    Bad("slots", "floats", lambda x: x.float(), TypeError),
    Bad("out", "of fewer tokens", lambda x: x[1:], ValueError),
    Bad("out", "of another dtype", lambda x: x.double(), TypeError),
    Bad("out", "columns of a wider one", lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]], ValueError),
]
BAD_VERIFY = [
    Bad("slots", "one dimension", lambda x: x[:, 0], ValueError),
    Bad("query_start_loc", "of fewer tokens", lambda x: x.clamp(max=3), ValueError),
    Bad("query_start_loc", "more tokens than columns", lambda x: torch.tensor([0, 0, 6]), ValueError),
    Bad("num_accepted_tokens", "none", lambda x: x * 0, IndexError),
    Bad("num_accepted_tokens", "more than columns", lambda x: x + COLUMNS, IndexError),
]
BAD_STEPS = [
    Bad("conv_step_state", "missing", lambda x: None, ValueError),
    Bad("conv_step_state", "of another dtype", lambda x: x.float(), TypeError),
    Bad("conv_step_state", "too short a window", lambda x: x[:, :, :, 1:], ValueError),
    Bad("step_state", "of fewer steps", lambda x: x[:, 1:], ValueError),
    Bad("step_state", "of fewer value heads", lambda x: x[:, :, 1:], ValueError),
    Bad("step_rows", "missing", lambda x: None, ValueError),
    Bad("step_rows", "behind the last", lambda x: x + 9, IndexError),
]


@pytest.mark.parametrize(
    ("call", "bad"),
    [(call, bad) for call, cases in (("decode", BAD), ("verify", [*BAD, *BAD_VERIFY, *BAD_STEPS])) for bad in cases],
    ids=str,
)
def test_bad_input_is_refused_by_name_and_nothing_is_written(call: str, bad: Bad) -> None:
    qkvz, ba = join(random_runs(SHAPE, [3, 3] if call == "verify" else [1, 1], *DTYPES))
    slots = distinct_slots(2 * COLUMNS, 15).view(2, COLUMNS)
    conv_state, state = empty_pools(SHAPE, 15, COLUMNS - 1, DTYPES[1:])
    arguments: dict[str, Any] = {"qkvz": qkvz, "ba": ba, "eps": EPS, "conv_state": conv_state, "state": state}
    arguments |= random_layer(SHAPE)._asdict() | {"slots": slots if call == "verify" else slots[:, 0]}
    if call == "verify":
        arguments |= {"query_start_loc": start_offsets([3, 3]), "num_accepted_tokens": torch.tensor([1, 2])}
        conv_steps, steps = empty_steps(SHAPE, 4, DTYPES[1:])
        if bad in BAD_STEPS:
            arguments |= {"conv_step_state": conv_steps, "step_state": steps, "step_rows": torch.tensor([1, 0])}
    arguments["out"] = torch.empty(len(qkvz), SHAPE.value_heads * SHAPE.value_dim, dtype=qkvz.dtype)
    arguments[bad.argument] = bad.change(arguments[bad.argument])
    function = gated_delta_net_verify if call == "verify" else gated_delta_net_decode
    with pytest.raises(bad.error, match=f"^{bad.argument}: expected"):
        function(**arguments)
    assert conv_state.isnan().all()
    assert state.isnan().all()
