"""Random layers and sequences for decode and verify of a Gated DeltaNet layer, in pools of shuffled slots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tests.kernels.delta_rule_runs import COLUMNS, Shape, random_gates, random_state
from tests.kernels.kernel_inputs import distinct_slots, nan_pool, nan_steps, start_offsets

WIDTH = 4
EPS = 1e-6


class Layer(NamedTuple):
    """conv_weight, A_log, dt_bias and norm_weight."""

    conv_weight: Tensor
    A_log: Tensor
    dt_bias: Tensor
    norm_weight: Tensor

    def double(self) -> Layer:
        return Layer(*(x.double() for x in self))


class Pools(NamedTuple):
    """Of the convolution [slots, D, W − 1 + drafts] and of the rule [slots, HV, V, K]."""

    conv: Tensor
    state: Tensor


class Run(NamedTuple):
    """The next tokens of a sequence, qkvz [T, H, …] and ba [T, H, 2 G], its inputs and state before them."""

    qkvz: Tensor
    ba: Tensor
    history: Tensor
    state: Tensor

    def rows(self, rows: slice) -> Run:
        return self._replace(qkvz=self.qkvz[rows], ba=self.ba[rows])


class Result(NamedTuple):
    """Outputs [T, HV · V], and the last W − 1 inputs [D, W − 1] and the state behind the last token."""

    out: Tensor
    history: Tensor
    state: Tensor


Decode = Callable[..., Tensor]
Verify = Callable[..., Tensor]


def channels(shape: Shape) -> int:
    return 2 * shape.key_heads * shape.key_dim + shape.value_heads * shape.value_dim


def random_layer(shape: Shape) -> Layer:
    conv_weight = torch.randn(channels(shape), WIDTH) * WIDTH**-0.5
    return Layer(conv_weight, *random_gates(shape), torch.randn(shape.value_dim))


def random_runs(
    shape: Shape, lengths: Sequence[int], dtype: torch.dtype, conv_dtype: torch.dtype, state_dtype: torch.dtype
) -> list[Run]:
    """Rows of the projections lie in wider ones, as those of a merged projection would."""
    width, group = 2 * shape.key_dim + 2 * shape.group * shape.value_dim, 2 * shape.group
    wide = torch.randn(sum(lengths), shape.key_heads, 1 + width + group).to(dtype)
    parts = wide[:, :, 1:].split(lengths)
    return [
        Run(
            part[:, :, :width],
            part[:, :, width:],
            torch.randn(channels(shape), WIDTH - 1).to(conv_dtype),
            random_state(shape, state_dtype),
        )
        for part in parts
    ]


def empty_pools(
    shape: Shape, slots: int, drafts: int, dtypes: Sequence[torch.dtype], *, channels_last: bool = False
) -> Pools:
    """Of NaN; ``dtypes`` are those of the convolution's pool and of the rule's."""
    columns = WIDTH - 1 + drafts
    if channels_last:
        conv = nan_pool(slots, (columns, channels(shape)), dtypes[0]).transpose(1, 2)
    else:
        conv = nan_pool(slots, (channels(shape), columns), dtypes[0])
    return Pools(conv, nan_pool(slots, shape.state, dtypes[1]))


def empty_steps(shape: Shape, rows: int, dtypes: Sequence[torch.dtype]) -> tuple[Tensor, Tensor]:
    """Step pools of NaN; the windows of a row of the convolution share their memory, as SGLang's do."""
    columns = COLUMNS + WIDTH - 2
    buffer = torch.full((rows, channels(shape), columns), math.nan, dtype=dtypes[0])
    strides = (buffer.stride(0), 1, columns, 1)
    conv = buffer.as_strided((rows, COLUMNS, channels(shape), WIDTH - 1), strides)
    return conv, nan_steps(rows, COLUMNS, shape.state, dtypes[1], steps_first=True)


def join(runs: Sequence[Run]) -> tuple[Tensor, Tensor]:
    return torch.cat([run.qkvz for run in runs]), torch.cat([run.ba for run in runs])


def dtypes_of(runs: Sequence[Run]) -> tuple[torch.dtype, torch.dtype]:
    return runs[0].history.dtype, runs[0].state.dtype


def decode(function: Decode, shape: Shape, layer: Layer, runs: Sequence[Run]) -> list[Result]:
    """Decode the first token of each run."""
    pools = empty_pools(shape, len(runs) + 3, 0, dtypes_of(runs))
    slots = distinct_slots(len(runs), len(runs) + 3)
    for run, slot in zip(runs, slots, strict=True):
        pools.conv[slot], pools.state[slot] = run.history, run.state
    first = [run.rows(slice(1)) for run in runs]
    out = function(*join(first), *layer, EPS, *pools, slots)
    return [Result(o[None], pools.conv[s].clone(), pools.state[s].clone()) for o, s in zip(out, slots, strict=True)]


def verify(function: Verify, shape: Shape, layer: Layer, runs: Sequence[Run]) -> list[Result]:
    """Verify runs that resume behind a random number of accepted tokens."""
    pools = empty_pools(shape, len(runs) * COLUMNS + 3, COLUMNS - 1, dtypes_of(runs), channels_last=True)
    slots = distinct_slots(len(runs) * COLUMNS, len(pools.state)).view(-1, COLUMNS)
    accepted = torch.randint(1, COLUMNS + 1, (len(runs),))
    for run, row, count in zip(runs, slots, accepted.tolist(), strict=True):
        pools.conv[row[0], :, count - 1 : count + WIDTH - 2], pools.state[row[count - 1]] = run.history, run.state
    lengths = [len(run.qkvz) for run in runs]
    out = function(*join(runs), *layer, EPS, *pools, slots, start_offsets(lengths), accepted)
    return [
        Result(o, pools.conv[row[0], :, length - 1 : length + WIDTH - 2].clone(), pools.state[row[length - 1]].clone())
        for o, row, length in zip(out.split(lengths), slots, lengths, strict=True)
    ]


def verify_into_steps(function: Verify, shape: Shape, layer: Layer, runs: Sequence[Run]) -> list[Result]:
    """The same with step pools; the slots are only read."""
    pools = empty_pools(shape, len(runs) + 3, 0, dtypes_of(runs))
    slots, rows = distinct_slots(len(runs), len(runs) + 3), distinct_slots(len(runs), len(runs) + 2)
    for run, slot in zip(runs, slots, strict=True):
        pools.conv[slot], pools.state[slot] = run.history, run.state
    before = [pool.clone() for pool in pools]
    lengths = [len(run.qkvz) for run in runs]
    conv_steps, steps = empty_steps(shape, len(runs) + 2, dtypes_of(runs))
    where = (slots[:, None], start_offsets(lengths), torch.ones_like(slots))
    out = function(*join(runs), *layer, EPS, *pools, *where, conv_steps, steps, rows)
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(pool.nan_to_num(), old.nan_to_num())
    return [
        Result(o, conv_steps[row, length - 1].clone(), steps[row, length - 1].clone())
        for o, row, length in zip(out.split(lengths), rows, lengths, strict=True)
    ]


def repeated_decode(function: Decode, shape: Shape, layer: Layer, run: Run) -> Result:
    outputs = []
    for t in range(len(run.qkvz)):
        ((out, history, state),) = decode(function, shape, layer, [run.rows(slice(t, t + 1))])
        outputs.append(out)
        run = run._replace(history=history, state=state)
    return Result(torch.cat(outputs), run.history, run.state)
