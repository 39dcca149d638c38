"""Rows of all that lies between the projections of a Gated DeltaNet layer.

A peer calls its convolution, its delta rule and its gated norm one after the other. It gets q, k, v, z, a and b apart,
which ours take as the projections leave them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

import qnext_kernels
from qnext_kernels.causal_conv1d.grouping import ungrouped
from qnext_kernels.gated_delta_net.split import split_projections
from qnext_plugins.cli.bench.gated_delta_net import (
    accepted,
    conv_pool,
    described,
    end_lengths,
    ends_of,
    fresh,
    heads_of,
    rule_pool,
    state_bytes,
    verify_starts,
)
from qnext_plugins.cli.bench.inputs import EPS, Case, Library, Part, Row, Side, Sizes, int32, normal, sides_of
from qnext_plugins.cli.bench.roofs import rotations


@dataclass
class Batch:
    """What a form of the layer is called with besides tokens and weights."""

    form: str
    """decode, prefill or verify."""
    tokens: int
    conv: Tensor
    """[slots, state_len, channels]."""
    state: Tensor
    slots: list[Tensor]
    """Those of the delta rule, turn by turn: [N] or, in a verify, [N, tokens]."""
    starts: Tensor
    rest: tuple[Tensor, ...] = ()
    """The arguments of ours behind the slots."""

    def turn(self, i: int) -> Tensor:
        """The slots of run ``i``."""
        return self.slots[i % len(self.slots)]

    def written(self) -> tuple[Tensor, Tensor]:
        """The slots that run 0 writes in the pools, of the convolution and of the rule."""
        slots = self.slots[0].long()
        return slots.view(len(slots), -1)[:, 0], slots.flatten()


def layer_rows(s: Sizes, libraries: Sequence[Library]) -> Iterator[Row]:
    value_dims, group = s.value_heads * s.linear_dim, s.value_heads // s.key_heads
    conv_weight, norm_weight = normal(s.channels, s.conv_width, scale=0.5), normal(s.linear_dim)
    gates = torch.rand(s.value_heads), normal(s.value_heads)
    layer = (conv_weight, *gates, norm_weight, EPS)
    # Once for all rows: a library may compile it.
    gated_norm = cache(lambda library: library.gated_rms_norm(norm_weight, EPS))

    def peer(library: Library, batch: Batch, qkvz: Tensor, ba: Tensor, columns: int) -> Side | None:
        own = batch.conv.clone()
        convolution, norm = library.convolution(conv_weight, own, heads_of(s)), gated_norm(library)
        if convolution is None or norm is None or (batch.form == "verify" and not hasattr(convolution, "verify")):
            return None
        rule = library.delta_rule(heads_of(s))
        if rule is None or batch.form not in rule.names:
            return None
        grouped_qkv, z, b, a = split_projections(qkvz, ba, batch.state)
        mixed_qkv, z = ungrouped(grouped_qkv, batch.state.shape[3]), z.reshape(-1, s.linear_dim)
        b, a = b.contiguous(), a.contiguous()
        state = batch.state.transpose(2, 3).contiguous() if rule.key_first else batch.state.clone()
        first = [slots[:, :1].contiguous() for slots in batch.slots] if batch.form == "verify" else []
        offsets = batch.rest if batch.form == "verify" else (batch.starts,)

        def convolve(i: int) -> Tensor:
            if batch.form == "verify":
                return convolution.verify(mixed_qkv, first[i % len(first)], *offsets)
            starts = None if batch.form == "decode" else batch.starts
            return convolution.convolve(mixed_qkv, batch.turn(i), starts, False)

        def run(i: int) -> Tensor:
            out = getattr(rule, batch.form)(convolve(i), a, b, *gates, state, batch.turn(i), *offsets)
            return norm[1](out.reshape(-1, s.linear_dim), z).view(batch.tokens, value_dims)

        name = " + ".join([convolution.name(lambda: convolve(0)), rule.names[batch.form], norm[0]])
        own.copy_(batch.conv)
        in_conv, in_state = batch.written()
        return Side(
            name,
            run,
            lambda: [own[in_conv, :columns], (state.transpose(2, 3) if rule.key_first else state)[in_state]],
        )

    def case(ours: Callable[..., Tensor], batch: Batch, states_moved: float, lengths: Sequence[int] = ()) -> Case:
        """``states_moved``: bytes of the rule's states; ``lengths``: of the sequences of a prefill."""
        qkvz = normal(batch.tokens, s.key_heads, 2 * (1 + group) * s.linear_dim)
        ba = normal(batch.tokens, s.key_heads, 2 * group)
        conv, (in_conv, in_state) = batch.conv.transpose(1, 2), batch.written()
        # Only a verify defines what it leaves behind the last W − 1 inputs.
        columns = batch.conv.shape[1] if batch.form == "verify" else s.conv_width - 1
        one_token = 2 * (s.channels + 2 * value_dims + 2 * s.value_heads)
        return Case(
            lambda i: ours(qkvz, ba, *layer, conv, batch.state, batch.turn(i), *batch.rest),
            sides_of(libraries, lambda library: peer(library, batch, qkvz, ba, columns)),
            flops=batch.tokens * (2 * s.conv_width * s.channels + 7 * s.value_heads * s.linear_dim**2),
            moved=batch.tokens * one_token + 4 * s.channels * len(in_conv) * batch.conv.shape[1] + states_moved,
            sets=len(batch.slots),
            part=ends(qkvz, ba, lengths) if lengths else None,
            pools=(batch.conv, batch.state),
            states=lambda: [batch.conv[in_conv, :columns], batch.state[in_state]],
            compiled=True,
        )

    def ends(qkvz: Tensor, ba: Tensor, lengths: Sequence[int]) -> Part:
        first, last = both = end_lengths(lengths)

        def ours() -> tuple[Tensor, ...]:
            # The last tokens begin from nothing: what came hundreds of tokens before is forgotten.
            conv, state = conv_pool(s, 3, False), rule_pool(s, 3)
            x, gates, pools = ends_of(qkvz, lengths), ends_of(ba, lengths), (conv.transpose(1, 2), state)
            out = qnext_kernels.gated_delta_net_prefill(x, gates, *layer, *pools, *fresh(both))
            return out[:first], out[-(last // 8) :], conv[2:], state[2:]

        return Part(ours, lambda out, conv, state: (out[:first], out[-(last // 8) :], conv[-1:], state[-1:]))

    def prefill(lengths: tuple[int, ...]) -> Case:
        slots, starts, initial = fresh(lengths)
        pools = conv_pool(s, 1 + len(lengths), False), rule_pool(s, 1 + len(lengths))
        batch = Batch("prefill", sum(lengths), *pools, [slots], starts, (starts, initial))
        return case(qnext_kernels.gated_delta_net_prefill, batch, len(lengths) * state_bytes(s), lengths)

    def decode(size: int) -> Case:
        sets = rotations(size * state_bytes(s))
        pools = conv_pool(s, 1 + sets * size, False), rule_pool(s, 1 + sets * size)
        slots = int32(1 + torch.arange(sets * size)).view(sets, size)
        batch = Batch("decode", size, *pools, list(slots), int32(torch.arange(size + 1)))
        return case(qnext_kernels.gated_delta_net_decode, batch, 2 * size * state_bytes(s))

    def verify(size: int) -> Case:
        steps = 1 + s.drafts
        sets = rotations(size * steps * state_bytes(s))
        pools = conv_pool(s, 1 + sets * size * steps, True), rule_pool(s, 1 + sets * size * steps)
        slots = int32(1 + torch.arange(sets * size * steps)).view(sets, size, steps)
        starts = verify_starts(s, size)
        batch = Batch("verify", size * steps, *pools, list(slots), starts, (starts, accepted(size)))
        return case(qnext_kernels.gated_delta_net_verify, batch, (1 + steps) * size * state_bytes(s))

    row = partial(Row, operation="gated_delta_rule", parts=("causal_conv1d", "gated_norm"))
    for lengths in (*((tokens,) for tokens in s.prefills), *s.packed):
        small, build = sum(lengths) <= 2048, partial(prefill, lengths)
        yield row("gated delta net prefill", described(lengths), build, quick=small, heavy=not small)
    for size in s.batches:
        yield row("gated delta net decode", f"B={size}", partial(decode, size), stepped=True)
    for size in s.batches:
        shape = f"B={size} × {1 + s.drafts} tokens"
        yield row("gated delta net verify", shape, partial(verify, size), stepped=True)
