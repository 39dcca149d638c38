"""Gated DeltaNet: projections, short convolution, gated delta rule, gated output norm.

Source: Gated Delta Networks (arXiv 2412.06464), transformers' ``Qwen3NextGatedDeltaNet``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qnext_kernels import (
    gated_delta_net_decode,
    gated_delta_net_prefill,
    gated_delta_net_verify,
    norm_linears,
    prepare_layer,
)
from qnext_plugins.model.config import Qwen3NextConfig
from qnext_plugins.model.norm import RMSNorm
from qnext_plugins.model.port import Engine

TokenIndex = slice | Tensor
"""Which rows of the batch a segment owns: a slice, or an index tensor [T of the segment]."""


@dataclass
class Segment:
    """Sequences that are prefilled (``query_start_loc`` and ``has_initial_state`` given) or decode one token each."""

    tokens: TokenIndex
    slots: Tensor
    """[N]; −1 is padding."""
    query_start_loc: Tensor | None = None
    """[N + 1], offsets within the segment."""
    has_initial_state: Tensor | None = None
    """[N] bool."""
    snapshot_slots: Tensor | None = None
    """[N]: of a prefill, further slots that get the state behind ``snapshot_lengths`` tokens; −1 for none."""
    snapshot_lengths: Tensor | None = None
    """[N], multiples of ``CHUNK_SIZE``."""


@dataclass
class VerifySegment:
    """Sequences that verify draft tokens."""

    tokens: TokenIndex
    slots: Tensor
    """[N, S]: the state behind token t goes to column t, unless there are step pools; −1 is padding."""
    query_start_loc: Tensor
    """[N + 1], offsets within the segment."""
    num_accepted_tokens: Tensor
    """[N], 1 to S: the column minus one that the sequence resumes from."""
    step_rows: Tensor | None = None
    """[N]: rows of the step pools that the states behind the tokens go to instead; −1 for none."""


@dataclass
class StatePools:
    """One layer's states, each written in place."""

    conv: Tensor
    """[slots, 2·H·K + HV·V, state_len]."""
    recurrent: Tensor
    """[slots, HV, V, K]."""
    conv_steps: Tensor | None = None
    """[rows, S, 2·H·K + HV·V, W − 1]: step pool of a verify."""
    recurrent_steps: Tensor | None = None
    """[rows, S, HV, V, K]."""


@dataclass
class RecurrentBatch:
    """Who does what in this batch; the engine fills it from its own metadata."""

    decode: Segment | None = None
    prefill: Segment | None = None
    verify: VerifySegment | None = None


class CoreWeights(NamedTuple):
    """One layer's weights between its projections, of this rank's heads."""

    conv: Tensor
    """[2·H·K + HV·V, W]."""
    A_log: Tensor
    """[HV]."""
    dt_bias: Tensor
    """[HV]."""
    norm: Tensor
    """[V], of the output norm."""


def gated_delta_net_core(
    qkvz: Tensor,
    ba: Tensor,
    weights: CoreWeights,
    eps: float,
    pools: StatePools,
    batch: RecurrentBatch,
    out: Tensor | None = None,
) -> Tensor:
    """Convolution, gated delta rule and gated output norm of one layer over a mixed batch.

    Args:
        qkvz: [T, H · (2·K + 2·G·V)] of ``in_proj_qkvz``, grouped by key head: its q, its k, the v of its G value heads
            and their z.
        ba: [T, H · 2·G] of ``in_proj_ba``: of every key head the b of its value heads and their a.
        weights: of this layer.
        eps: of the output norm.
        pools: of this layer, written in place.
        batch: the segments, which share no row; rows of no segment are zero in the result.
        out: [T, HV·V] in the dtype of ``qkvz``, contiguous, where the result is written; overlaps nothing else.

    Returns:
        [T, HV·V] in the dtype of ``qkvz``; ``out`` where it is given.
    """
    num_tokens, (value_heads, value_dim, key_dim) = len(qkvz), pools.recurrent.shape[1:]
    key_heads = (qkvz.shape[1] - 2 * value_heads * value_dim) // (2 * key_dim)
    # Not unflatten, which is Python and takes a multiple of the time.
    qkvz, ba = (x.view(num_tokens, key_heads, x.shape[1] // key_heads) for x in (qkvz, ba))
    segments = [segment for segment in (batch.verify, batch.decode, batch.prefill) if segment is not None]
    covered = sum(_count(segment.tokens, num_tokens) for segment in segments)
    if out is None:
        if len(segments) == 1 and isinstance(segments[0].tokens, slice) and covered == num_tokens:
            return _run(segments[0], (qkvz, ba), weights, eps, pools)  # as mostly
        out = qkvz.new_empty(num_tokens, value_heads * value_dim)
    if covered < num_tokens:
        out.zero_()
    for segment in segments:
        if isinstance(segment.tokens, slice):
            _run(segment, (qkvz, ba), weights, eps, pools, out[segment.tokens])
        else:
            out[segment.tokens] = _run(segment, (qkvz, ba), weights, eps, pools)
    return out


class GatedDeltaNetCore:
    """:func:`gated_delta_net_core` of one layer, step by step: on a CPU what stays is looked at once.

    Args:
        eps: of the output norm.
    """

    def __init__(self, eps: float) -> None:
        self._eps = eps
        self._prepared: Any = None

    def __call__(
        self,
        qkvz: Tensor,
        ba: Tensor,
        weights: CoreWeights,
        pools: StatePools,
        batch: RecurrentBatch,
        out: Tensor | None = None,
    ) -> Tensor:
        """As the function."""
        segment = only_segment(batch, qkvz.shape[0]) if qkvz.is_cpu else None
        if segment is not None:
            of = (qkvz, ba, weights, pools.conv, pools.recurrent)
            if self._prepared is None or not self._prepared.is_of(*of):
                self._prepared = prepare_layer(*of[:3], self._eps, *of[3:])
            if self._prepared is not None:
                if isinstance(segment, Segment):
                    return self._prepared.decode(qkvz, ba, segment.slots, out)
                where = (segment.query_start_loc, segment.num_accepted_tokens)
                return self._prepared.verify(qkvz, ba, segment.slots, *where, out)
        return gated_delta_net_core(qkvz, ba, weights, self._eps, pools, batch, out)


def only_segment(batch: RecurrentBatch, num_tokens: int) -> Segment | VerifySegment | None:
    """The decode, or the verify without step pools, that is all of a batch of so many tokens; or None."""
    segment = batch.verify or batch.decode
    if segment is None or batch.prefill is not None or (batch.verify is not None and batch.decode is not None):
        return None
    if isinstance(segment, VerifySegment) and segment.step_rows is not None:
        return None
    tokens = segment.tokens
    everything = isinstance(tokens, slice) and not tokens.start and tokens.stop in (None, num_tokens)
    return segment if everything else None


def _count(tokens: TokenIndex, num_tokens: int) -> int:
    """How many of ``num_tokens`` these are."""
    return len(range(*tokens.indices(num_tokens))) if isinstance(tokens, slice) else len(tokens)


def _run(
    segment: Segment | VerifySegment,
    projections: tuple[Tensor, Tensor],
    weights: CoreWeights,
    eps: float,
    pools: StatePools,
    out: Tensor | None = None,
) -> Tensor:
    """Run one segment; ``projections`` are those of the whole batch, ``out`` is for the segment alone."""
    qkvz, ba = (projection[segment.tokens] for projection in projections)
    layer = (qkvz, ba, *weights, eps, pools.conv, pools.recurrent, segment.slots)
    if isinstance(segment, VerifySegment):
        where, rows = (segment.query_start_loc, segment.num_accepted_tokens), segment.step_rows
        conv_steps, steps = (None, None) if rows is None else (pools.conv_steps, pools.recurrent_steps)
        return gated_delta_net_verify(*layer, *where, conv_steps, steps, rows, out)
    if segment.query_start_loc is None:
        return gated_delta_net_decode(*layer, out)
    assert segment.has_initial_state is not None
    starts, snapshots = segment.query_start_loc, (segment.snapshot_slots, segment.snapshot_lengths)
    return gated_delta_net_prefill(*layer, starts, segment.has_initial_state, *snapshots, out)


class GatedDeltaNet(nn.Module):
    """All before the output projection; parameters are named as in the checkpoint (``in_proj_qkvz``, ``A_log``, …).

    Where the engine joins ``in_proj_qkvz`` and ``in_proj_ba``, ``in_proj_qkvzba`` has both, in this order.
    """

    def __init__(self, config: Qwen3NextConfig, engine: Engine, *, prefix: str) -> None:
        super().__init__()
        self._engine = engine
        # Both projections are grouped by key head in the checkpoint, so a plain split keeps each group on one rank.
        qkvz, ba = 2 * config.key_dim + 2 * config.value_dim, 2 * config.linear_num_value_heads
        name = f"{prefix}.in_proj_qkvzba"
        self.in_proj_qkvzba = engine.joined_column_linear(config.hidden_size, (qkvz, ba), prefix=name)
        self._widths = [size // engine.tensor_parallel_size for size in (qkvz, ba)]
        if self.in_proj_qkvzba is None:
            self.in_proj_qkvz = engine.column_linear(config.hidden_size, qkvz, prefix=f"{prefix}.in_proj_qkvz")
            self.in_proj_ba = engine.column_linear(config.hidden_size, ba, prefix=f"{prefix}.in_proj_ba")
        segments = (config.key_dim, config.key_dim, config.value_dim)
        self.conv1d = ShortConvolution(engine.conv_weight(segments, config.linear_conv_kernel_dim))
        self.A_log = engine.head_parameter(config.linear_num_value_heads)
        self.dt_bias = engine.head_parameter(config.linear_num_value_heads)
        self.norm = OutputNorm(config.linear_value_head_dim)
        self.out_proj = engine.row_linear(
            config.value_dim, config.hidden_size, reduce=True, prefix=f"{prefix}.out_proj"
        )
        self.core = engine.recurrent_core(config, prefix=prefix)

    def forward(self, hidden_states: Tensor, residual: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """Mix the normalised sum of hidden states [T, hidden] and residual [T, hidden] or None.

        Returns:
            What ``out_proj`` is to project, [T, value_dim of this rank], and the sum.
        """
        if self.in_proj_qkvzba is not None:
            hidden_states, residual = norm(hidden_states, residual)
            qkvz, ba = self.in_proj_qkvzba(hidden_states).split(self._widths, dim=-1)
            return self.core(qkvz, ba, self.core_weights()), residual
        in_qkvz, in_ba = self._engine.linear_weight(self.in_proj_qkvz), self._engine.linear_weight(self.in_proj_ba)
        if in_qkvz is not None and in_ba is not None:
            qkvz, ba, residual = norm_linears(hidden_states, residual, norm.weight, norm.eps, in_qkvz, in_ba)
        else:
            hidden_states, residual = norm(hidden_states, residual)
            qkvz, ba = self.in_proj_qkvz(hidden_states), self.in_proj_ba(hidden_states)
        return self.core(qkvz, ba, self.core_weights()), residual

    def core_weights(self) -> CoreWeights:
        """What the recurrent core takes besides the projections."""
        return CoreWeights(self.conv1d.weight.squeeze(1), self.A_log, self.dt_bias, self.norm.weight)


class ShortConvolution(nn.Module):
    """Holds the weight [channels, 1, W] under the checkpoint's name; the recurrent core convolves."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class OutputNorm(nn.Module):
    """Holds the weight of the gated norm, one value head's, under the checkpoint's name; the recurrent core norms."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)
