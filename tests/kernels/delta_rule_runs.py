"""Random sequences for the gated delta rule, and its three calls on them in pools of shuffled slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qnext_kernels import gated_delta_rule_decode, gated_delta_rule_prefill, gated_delta_rule_verify
from tests.kernels.kernel_inputs import distinct_slots, nan_pool, start_offsets

COLUMNS = 4
"""Columns of ``slots`` in a verify: the last accepted token and three drafts."""


class Shape(NamedTuple):
    key_heads: int
    group: int
    key_dim: int
    value_dim: int

    @property
    def value_heads(self) -> int:
        return self.key_heads * self.group

    @property
    def state(self) -> tuple[int, int, int]:
        return self.value_heads, self.value_dim, self.key_dim


SHAPES = [Shape(2, 1, 16, 24), Shape(2, 2, 32, 8), Shape(1, 3, 20, 36)]
MODEL_SHAPE = Shape(1, 2, 128, 128)
"""Head dimensions of the published model."""


class Tokens(NamedTuple):
    """q and k [T, H, K], v [T, HV, V], a and b [T, HV]."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor

    def rows(self, rows: slice) -> Tokens:
        return Tokens(*(x[rows] for x in self))

    def double(self) -> Tokens:
        return Tokens(*(x.double() for x in self))


class Run(NamedTuple):
    """The next tokens of a sequence and the state [HV, V, K] before them (None: it starts here)."""

    tokens: Tokens
    state: Tensor | None


class Result(NamedTuple):
    """Outputs [T, HV, V] and the state [HV, V, K] behind the last token."""

    out: Tensor
    state: Tensor


class Gates(NamedTuple):
    """A_log and dt_bias [HV]."""

    A_log: Tensor
    dt_bias: Tensor


def random_tokens(shape: Shape, count: int, dtype: torch.dtype) -> Tokens:
    q, k = torch.randn(2, count, shape.key_heads, shape.key_dim).to(dtype)
    v = torch.randn(count, shape.value_heads, shape.value_dim).to(dtype)
    a, b = torch.randn(2, count, shape.value_heads).to(dtype)
    return Tokens(q, k, v, a, b)


def random_gates(shape: Shape) -> Gates:
    """Heads that forget within a token beside heads that remember hundreds."""
    return Gates(torch.empty(shape.value_heads).uniform_(-5, 2), torch.randn(shape.value_heads))


def random_state(shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape.state).to(dtype)


def random_runs(shape: Shape, lengths: Sequence[int], dtype: torch.dtype, state_dtype: torch.dtype) -> list[Run]:
    return [Run(random_tokens(shape, length, dtype), random_state(shape, state_dtype)) for length in lengths]


def join(runs: Sequence[Run]) -> Tokens:
    return Tokens(*(torch.cat(parts) for parts in zip(*(run.tokens for run in runs), strict=True)))


def place(
    runs: Sequence[Run], state_dtype: torch.dtype, *, columns: int = 1, accepted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A pool and slots [N, columns] in it; each run's state is in column ``accepted − 1`` (None: the first)."""
    tokens = runs[0].tokens
    shape = (tokens.v.shape[1], tokens.v.shape[2], tokens.q.shape[2])
    pool = nan_pool(len(runs) * columns + 3, shape, state_dtype)
    slots = distinct_slots(len(runs) * columns, len(pool)).view(-1, columns)
    for n, run in enumerate(runs):
        if run.state is not None:
            pool[slots[n, 0 if accepted is None else accepted[n] - 1]] = run.state
    return pool, slots


def prefill(runs: Sequence[Run], gates: Gates, state_dtype: torch.dtype) -> list[Result]:
    tokens, lengths = join(runs), [len(run.tokens.v) for run in runs]
    pool, slots = place(runs, state_dtype)
    slots, known = slots[:, 0], torch.tensor([run.state is not None for run in runs])
    out = gated_delta_rule_prefill(*tokens, *gates, pool, slots, start_offsets(lengths), known)
    return [Result(o, pool[slot].clone()) for o, slot in zip(out.split(lengths), slots, strict=True)]


def decode(runs: Sequence[Run], gates: Gates, state_dtype: torch.dtype) -> list[Result]:
    """Decode the first token of each run."""
    tokens = join([Run(run.tokens.rows(slice(1)), run.state) for run in runs])
    pool, slots = place(runs, state_dtype)
    slots = slots[:, 0]
    out = gated_delta_rule_decode(*tokens, *gates, pool, slots)
    return [Result(out[n : n + 1], pool[slot].clone()) for n, slot in enumerate(slots)]


def verify(runs: Sequence[Run], gates: Gates, state_dtype: torch.dtype) -> list[Result]:
    """Verify runs that resume from a random column of their slots."""
    tokens, lengths = join(runs), [len(run.tokens.v) for run in runs]
    accepted = torch.randint(1, COLUMNS + 1, (len(runs),))
    pool, slots = place(runs, state_dtype, columns=COLUMNS, accepted=accepted)
    out = gated_delta_rule_verify(*tokens, *gates, pool, slots, start_offsets(lengths), accepted)
    last = [row[length - 1] for row, length in zip(slots, lengths, strict=True)]
    return [Result(o, pool[slot].clone()) for o, slot in zip(out.split(lengths), last, strict=True)]


def repeated_decode(run: Run, gates: Gates, state_dtype: torch.dtype) -> Result:
    assert run.state is not None
    outputs, state = [], run.state
    for t in range(len(run.tokens.v)):
        ((out, state),) = decode([Run(run.tokens.rows(slice(t, t + 1)), state)], gates, state_dtype)
        outputs.append(out)
    return Result(torch.cat(outputs), state)
