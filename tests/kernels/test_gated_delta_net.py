"""Decode and verify of a Gated DeltaNet layer, where its operations are called one after the other."""

from __future__ import annotations

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
from tests.kernels import delta_net_runs as runs_of
from tests.kernels.delta_net_runs import EPS, Pools, Result, empty_pools, empty_steps, join, random_layer, random_runs
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


@every_backend
@pytest.mark.parametrize("with_steps", [False, True])
def test_verify_is_the_operations_one_after_the_other(backend: str, with_steps: bool) -> None:
    layer, lengths = random_layer(SHAPE), [1, 3, COLUMNS]
    qkvz, ba = join(random_runs(SHAPE, lengths, *DTYPES))
    slots = distinct_slots(3 * COLUMNS, 15).view(3, COLUMNS)
    where = start_offsets(lengths), torch.tensor([1, COLUMNS, 2])
    steps = empty_steps(SHAPE, 5, DTYPES[1:]) if with_steps else ()
    rows = [torch.tensor([3, -1, 0])] if with_steps else []
    before = empty_pools(SHAPE, 15, COLUMNS - 1, DTYPES[1:])
    for pool in before:
        pool.normal_()
    ours, theirs = (Pools(*(pool.clone() for pool in before)) for _ in range(2))
    our_steps, their_steps = ([pool.clone() for pool in steps] for _ in range(2))
    mixed, z, a, b = head_by_head(qkvz, ba, SHAPE)
    with force_backend(backend):
        out = gated_delta_net_verify(qkvz, ba, *layer, EPS, *ours, slots, *where, *our_steps, *rows)
        conv_where = (slots[:, 0], *where, *their_steps[:1], *rows)
        convolved = causal_conv1d_verify(mixed, layer.conv_weight, theirs.conv, *conv_where)
        rule = layer.A_log, layer.dt_bias, theirs.state, slots, *where, *their_steps[1:], *rows
        expected = gated_delta_rule_verify(*split(convolved, SHAPE), a, b, *rule)
        expected = gated_rms_norm(expected, z, layer.norm_weight, EPS).flatten(1)
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
    ours = empty_pools(SHAPE, 5, 0, DTYPES[1:])
    for pool in ours:
        pool.normal_()
    theirs = Pools(*(pool.clone() for pool in ours))
    mixed, z, a, b = head_by_head(qkvz, ba, SHAPE)
    with force_backend(backend):
        out = gated_delta_net_decode(qkvz, ba, *layer, EPS, *ours, slots)
        convolved = causal_conv1d_decode(mixed, layer.conv_weight, theirs.conv, slots)
        rule = layer.A_log, layer.dt_bias, theirs.state, slots
        expected = gated_delta_rule_decode(*split(convolved, SHAPE), a, b, *rule)
        expected = gated_rms_norm(expected, z, layer.norm_weight, EPS).flatten(1)
    for actual, want in zip((out, *ours), (expected, *theirs), strict=True):
        assert same_bits(actual, want)


@every_backend
def test_verify_equals_repeated_decode(backend: str) -> None:
    layer, runs = random_layer(SHAPE), random_runs(SHAPE, [1, 2, COLUMNS], *DTYPES)
    with force_backend(backend):
        for call in (runs_of.verify, runs_of.verify_into_steps):
            for run, verified in zip(runs, call(gated_delta_net_verify, SHAPE, layer, runs), strict=True):
                expected: Result = runs_of.repeated_decode(gated_delta_net_decode, SHAPE, layer, run)
                for actual, want in zip(verified, expected, strict=True):
                    assert same_bits(actual, want)


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
    arguments[bad.argument] = bad.change(arguments[bad.argument])
    function = gated_delta_net_verify if call == "verify" else gated_delta_net_decode
    with pytest.raises(bad.error, match=f"^{bad.argument}: expected"):
        function(**arguments)
    assert conv_state.isnan().all()
    assert state.isnan().all()
