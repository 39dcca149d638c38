"""Gated DeltaNet: projections, short convolution, gated delta rule, gated output norm.

Source: Gated Delta Networks (arXiv 2412.06464), transformers' ``Qwen3NextGatedDeltaNet``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qnext_kernels import (
    causal_conv1d_decode,
    causal_conv1d_prefill,
    causal_conv1d_verify,
    gated_delta_rule_decode,
    gated_delta_rule_prefill,
    gated_delta_rule_verify,
    gated_rms_norm,
)
from qnext_plugins.model.config import Qwen3NextConfig
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


def gated_delta_net_core(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    pools: StatePools,
    batch: RecurrentBatch,
) -> Tensor:
    """Convolution and gated delta rule of one layer over a mixed batch.

    Args:
        mixed_qkv: [T, 2·H·K + HV·V], queries, keys and values before the convolution.
        a, b: [T, HV].
        conv_weight: [2·H·K + HV·V, W].
        A_log, dt_bias: [HV].
        pools: of this layer, written in place.
        batch: the segments; rows of no segment are zero in the result.

    Returns:
        [T, HV, V] in the dtype of ``mixed_qkv``.
    """
    state = pools.recurrent
    parts: list[tuple[TokenIndex, Tensor]] = []

    def inputs(tokens: TokenIndex, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return *_split_qkv(convolved, state), a[tokens], b[tokens]

    conv_layer, layer = (conv_weight, pools.conv), (A_log, dt_bias, state)

    if (verify := batch.verify) is not None:
        tokens, where = verify.tokens, (verify.query_start_loc, verify.num_accepted_tokens)
        conv_steps, steps = (
            ((pool, verify.step_rows) if verify.step_rows is not None else (None, None))
            for pool in (pools.conv_steps, pools.recurrent_steps)
        )
        convolved = causal_conv1d_verify(mixed_qkv[tokens], *conv_layer, verify.slots[:, 0], *where, *conv_steps)
        rest = (verify.slots, *where, *steps)
        parts.append((tokens, gated_delta_rule_verify(*inputs(tokens, convolved), *layer, *rest)))
    if (decode := batch.decode) is not None:
        convolved = causal_conv1d_decode(mixed_qkv[decode.tokens], *conv_layer, decode.slots)
        result = gated_delta_rule_decode(*inputs(decode.tokens, convolved), *layer, decode.slots)
        parts.append((decode.tokens, result))
    if (prefill := batch.prefill) is not None:
        assert prefill.query_start_loc is not None
        assert prefill.has_initial_state is not None
        slots = (prefill.slots, prefill.query_start_loc, prefill.has_initial_state)
        snapshots = (prefill.snapshot_slots, prefill.snapshot_lengths)
        convolved = causal_conv1d_prefill(mixed_qkv[prefill.tokens], *conv_layer, *slots, *snapshots)
        result = gated_delta_rule_prefill(*inputs(prefill.tokens, convolved), *layer, *slots, *snapshots)
        parts.append((prefill.tokens, result))
    if len(parts) == 1 and isinstance(tokens := parts[0][0], slice) and tokens == slice(0, len(mixed_qkv)):
        return parts[0][1]  # as mostly
    out = mixed_qkv.new_zeros(mixed_qkv.shape[0], *state.shape[1:3])
    for tokens, result in parts:
        out[tokens] = result
    return out


def _split_qkv(convolved: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[T, 2·H·K + HV·V] → q, k [T, H, K] and v [T, HV, V]; the sizes are those of the state pool."""
    _, num_value_heads, value_dim, key_dim = state.shape
    keys = (convolved.shape[1] - num_value_heads * value_dim) // 2
    q, k, v = convolved.split([keys, keys, num_value_heads * value_dim], dim=1)
    return q.unflatten(1, (-1, key_dim)), k.unflatten(1, (-1, key_dim)), v.unflatten(1, (-1, value_dim))


class GatedDeltaNet(nn.Module):
    """[T, hidden] → [T, hidden]; parameters are named as in the checkpoint (``in_proj_qkvz``, ``A_log``, …)."""

    def __init__(self, config: Qwen3NextConfig, engine: Engine, *, prefix: str) -> None:
        super().__init__()
        ranks = engine.tensor_parallel_size
        self.num_key_heads = config.linear_num_key_heads // ranks
        self.group = config.linear_num_value_heads // config.linear_num_key_heads
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        # Both projections are grouped by key head in the checkpoint, so a plain split keeps each group on one rank.
        qkvz, ba = 2 * config.key_dim + 2 * config.value_dim, 2 * config.linear_num_value_heads
        self.in_proj_qkvz = engine.column_linear(config.hidden_size, qkvz, prefix=f"{prefix}.in_proj_qkvz")
        self.in_proj_ba = engine.column_linear(config.hidden_size, ba, prefix=f"{prefix}.in_proj_ba")
        segments = (config.key_dim, config.key_dim, config.value_dim)
        self.conv1d = ShortConvolution(engine.conv_weight(segments, config.linear_conv_kernel_dim))
        self.A_log = engine.head_parameter(config.linear_num_value_heads)
        self.dt_bias = engine.head_parameter(config.linear_num_value_heads)
        self.norm = GatedRMSNorm(self.value_dim, config.rms_norm_eps)
        self.out_proj = engine.row_linear(
            config.value_dim, config.hidden_size, reduce=True, prefix=f"{prefix}.out_proj"
        )
        self.core = engine.recurrent_core(config, prefix=prefix)

    def forward(self, hidden_states: Tensor) -> Tensor:
        mixed_qkv, z, b, a = self.split_projections(self.in_proj_qkvz(hidden_states), self.in_proj_ba(hidden_states))
        out = self.core(mixed_qkv, a, b, self.conv1d.weight.squeeze(1), self.A_log, self.dt_bias)
        return self.out_proj(self.norm(out, z).flatten(1))

    def split_projections(self, qkvz: Tensor, ba: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Undo the grouping by key head: [q, k, its values, their z] and [its b, its a] per key head.

        Returns:
            mixed_qkv [T, 2·H·K + HV·V], z [T, HV, V], b and a [T, HV].
        """
        values = self.group * self.value_dim
        grouped = qkvz.unflatten(1, (self.num_key_heads, 2 * self.key_dim + 2 * values))
        q, k, v, z = grouped.split([self.key_dim, self.key_dim, values, values], dim=2)
        b, a = ba.unflatten(1, (self.num_key_heads, 2 * self.group)).split(self.group, dim=2)
        mixed_qkv = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=1)
        return mixed_qkv, z.reshape(len(z), self.num_key_heads * self.group, self.value_dim), b.flatten(1), a.flatten(1)


class ShortConvolution(nn.Module):
    """Holds the weight [channels, 1, W] under the checkpoint's name; the recurrent core convolves."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class GatedRMSNorm(nn.Module):
    """The DeltaNet's output norm, one value head at a time."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(x, z, self.weight, self.eps)
