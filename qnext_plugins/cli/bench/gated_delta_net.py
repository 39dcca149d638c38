"""Rows of Gated DeltaNet: the convolution and the delta rule, each apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import qnext_kernels
from qnext_kernels.dispatch import deterministic
from qnext_kernels.gated_delta_rule.reference import CHUNK_SIZE
from qnext_plugins.cli.bench.inputs import PART, Case, Library, Part, Row, Side, Sizes, int32, normal, sides_of
from qnext_plugins.cli.bench.roofs import Call, rotations

OTHER_PREFILLS = ("triton_context_parallel", "flash_qla")
"""Backends that are prefills of their own, and otherwise those of ``triton``."""


def heads_of(s: Sizes) -> tuple[int, int, int]:
    return s.key_heads, s.value_heads, s.linear_dim


def fresh(lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Slots from 1 on, starts and ``has_initial_state`` of new sequences."""
    starts = int32([0, *accumulate(lengths)])
    return int32(range(1, len(lengths) + 1)), starts, torch.zeros(len(lengths), dtype=torch.bool)


def described(lengths: Sequence[int]) -> str:
    """The shape of a prefill, in the table."""
    tokens = f"T={sum(lengths)}"
    return tokens if len(lengths) == 1 else f"{tokens} N={len(lengths)} ragged"


def end_lengths(lengths: Sequence[int]) -> tuple[int, int]:
    """How many tokens the reference takes of the first sequence and of the last: where a whole batch takes minutes."""
    return min(PART, lengths[0]), min(PART, lengths[-1])


def ends_of(tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """The first tokens of the first sequence, then the last tokens of the last."""
    first, last = end_lengths(lengths)
    return torch.cat([tokens[:first], tokens[len(tokens) - last :]])


def accepted(batch: int) -> Tensor:
    """Of a verify: every sequence starts behind its second token."""
    return torch.full((batch,), 2).int()


def verify_starts(s: Sizes, batch: int) -> Tensor:
    """Where each sequence of a verify starts."""
    tokens = 1 + s.drafts
    return int32(torch.arange(0, tokens * batch + 1, tokens))


def conv_pool(s: Sizes, slots: int, speculation: bool) -> Tensor:
    """[slots, state_len, channels], channels last as vLLM lays it out by default."""
    return normal(slots, s.conv_width - 1 + (s.drafts if speculation else 0), s.channels)


def rule_pool(s: Sizes, slots: int) -> Tensor:
    """[slots, HV, V, K] in float32, the same state in every slot."""
    pool = (torch.randn(s.value_heads * s.linear_dim**2) * 0.1).expand(slots, -1).contiguous()
    qnext_kernels.use_huge_pages(pool)  # as the engines' are with us
    return pool.view(slots, s.value_heads, s.linear_dim, s.linear_dim)


def state_bytes(s: Sizes) -> int:
    """Of the delta rule's state of one sequence."""
    return s.value_heads * s.linear_dim**2 * 4


def conv_rows(s: Sizes, libraries: Sequence[Library]) -> Iterator[Row]:
    weight = normal(s.channels, s.conv_width, scale=0.5)

    def case(
        ours: Call,
        pool: Tensor,
        slots: list[Tensor],
        method: str,
        peer_call: Callable[[Any, int], Any],
        tokens: int,
        columns: int,
        sets: int,
        part: Part | None = None,
    ) -> Case:
        """``slots``: the sequences' slots, turn by turn; ``columns``: how much of a slot is defined afterwards."""
        written = slots[0].long()

        def side(library: Library) -> Side | None:
            own = pool.clone()
            layer = library.convolution(weight, own, heads_of(s))
            if not hasattr(layer, method):
                return None
            before = own.clone()
            name = layer.name(lambda: peer_call(layer, 0))
            own.copy_(before)
            return Side(name, lambda i: peer_call(layer, i), lambda: [own[written, :columns]])

        return Case(
            ours,
            sides_of(libraries, side),
            flops=2 * s.conv_width * tokens * s.channels,
            moved=2 * s.channels * (2 * tokens + 2 * len(written) * pool.shape[1]),
            sets=sets,
            part=part,
            pools=(pool,),
            states=lambda: [pool[written, :columns]],
        )

    def prefill(lengths: tuple[int, ...], speculation: bool) -> Case:
        tokens = sum(lengths)
        x = [normal(tokens, s.channels) for _ in range(rotations(4 * tokens * s.channels))]
        pool = conv_pool(s, 1 + len(lengths), speculation)
        slots, starts, initial = fresh(lengths)
        state = pool.transpose(1, 2)

        def ends() -> tuple[Tensor, ...]:
            first, _ = both = end_lengths(lengths)
            own = pool.new_zeros(3, *pool.shape[1:])
            y = qnext_kernels.causal_conv1d_prefill(ends_of(x[0], lengths), weight, own.transpose(1, 2), *fresh(both))
            return y[:first], own[2:, : s.conv_width - 1]

        return case(
            lambda i: qnext_kernels.causal_conv1d_prefill(x[i % len(x)], weight, state, slots, starts, initial),
            pool,
            [slots],
            "convolve",
            lambda layer, i: layer.convolve(x[(i + 1 if i else 0) % len(x)], slots, starts, speculation),
            tokens,
            s.conv_width - 1,
            len(x),
            Part(ends, lambda y, states: (y[: end_lengths(lengths)[0]], states[-1:])),
        )

    def decode(batch: int) -> Case:
        x, slots, pool = batched(batch, 1, speculation=False)
        state = pool.transpose(1, 2)
        return case(
            lambda i: qnext_kernels.causal_conv1d_decode(x, weight, state, slots[i % len(slots)]),
            pool,
            slots,
            "convolve",
            lambda layer, i: layer.convolve(x, slots[i % len(slots)], None, False),
            batch,
            s.conv_width - 1,
            len(slots),
        )

    def verify(batch: int) -> Case:
        x, slots, pool = batched(batch, 1 + s.drafts, speculation=True)
        rest, state = (verify_starts(s, batch), accepted(batch)), pool.transpose(1, 2)
        return case(
            lambda i: qnext_kernels.causal_conv1d_verify(x, weight, state, slots[i % len(slots)], *rest),
            pool,
            slots,
            "verify",
            lambda layer, i: layer.verify(x, slots[i % len(slots)][:, None], *rest),
            (1 + s.drafts) * batch,
            pool.shape[1],
            len(slots),
        )

    def batched(batch: int, tokens: int, speculation: bool) -> tuple[Tensor, list[Tensor], Tensor]:
        sets = rotations(batch * s.channels * 2 * 5)
        slots = [int32(1 + n * batch + torch.arange(batch)) for n in range(sets)]
        return normal(batch * tokens, s.channels), slots, conv_pool(s, 1 + sets * batch, speculation)

    row = partial(Row, operation="causal_conv1d")
    for lengths in (*((tokens,) for tokens in s.conv_prefills), *s.packed):
        yield row("conv prefill", described(lengths), partial(prefill, lengths, False), heavy=sum(lengths) > 8192)
    tokens = s.conv_prefills[0]
    yield row("conv prefill, speculation", f"T={tokens}", partial(prefill, (tokens,), True))
    for batch in s.batches:
        yield row("conv decode", f"B={batch}", partial(decode, batch), stepped=True)
    for batch in s.batches:
        yield row("conv verify", f"B={batch} × {1 + s.drafts} tokens", partial(verify, batch), stepped=True)


def delta_rule_rows(s: Sizes, libraries: Sequence[Library]) -> Iterator[Row]:
    key_dims, value_dims = s.key_heads * s.linear_dim, s.value_heads * s.linear_dim
    one_state = state_bytes(s)

    def inputs(tokens: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """What the convolution leaves, then a, b, A_log and dt_bias."""
        a, b = normal(tokens, s.value_heads), normal(tokens, s.value_heads)
        return normal(tokens, s.channels), (a, b, torch.rand(s.value_heads), normal(s.value_heads))

    def split(convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = convolved.split([key_dims, key_dims, value_dims], dim=1)
        q, k, v = (part.unflatten(1, (-1, s.linear_dim)) for part in parts)
        return q, k, v

    def case(
        ours: Call,
        pool: Tensor,
        slots: list[Tensor],
        method: str,
        peer_call: Callable[[Any, Tensor, int], Any],
        tokens: int,
        moved: float,
        part: Part | None = None,
    ) -> Case:
        """``slots``: those that are written, turn by turn."""
        written = slots[0].flatten().long()

        def side(library: Library) -> Side | None:
            layer = library.delta_rule(heads_of(s))
            if layer is None or method not in layer.names:
                return None
            call = getattr(layer, method)
            own = pool.transpose(2, 3).contiguous() if layer.key_first else pool.clone()
            return Side(
                layer.names[method],
                lambda i: peer_call(call, own, i),
                lambda: [own[written].transpose(2, 3) if layer.key_first else own[written]],
            )

        return Case(
            ours,
            sides_of(libraries, side),
            # The recurrence itself; the chunked form does 1.4 times as much.
            flops=tokens * s.value_heads * 7 * s.linear_dim**2,
            moved=moved,
            sets=len(slots),
            part=part,
            pools=(pool,),
            states=lambda: [pool[written]],
        )

    def prefill(lengths: tuple[int, ...]) -> Case:
        tokens = sum(lengths)
        convolved, rest = inputs(tokens)
        pool = rule_pool(s, 1 + len(lengths))
        slots, starts, initial = fresh(lengths)

        def ends() -> tuple[Tensor, ...]:
            # The last tokens begin from a zero state: what came hundreds of tokens before is forgotten.
            own, (a, b, A_log, dt_bias) = pool.new_zeros(3, *pool.shape[1:]), rest
            q, k, v = split(ends_of(convolved, lengths))
            gates = ends_of(a, lengths), ends_of(b, lengths), A_log, dt_bias
            out = qnext_kernels.gated_delta_rule_prefill(q, k, v, *gates, own, *fresh(end_lengths(lengths)))
            return out[:first], out[-(last // 8) :], own[2:]

        first, last = end_lengths(lengths)
        return case(
            lambda i: qnext_kernels.gated_delta_rule_prefill(*split(convolved), *rest, pool, slots, starts, initial),
            pool,
            [slots],
            "prefill",
            lambda call, own, i: call(convolved, *rest, own, slots, starts),
            tokens,
            2 * tokens * (s.channels + value_dims) + len(lengths) * one_state,
            Part(ends, lambda out, states: (out[:first], out[-(last // 8) :], states[-1:])),
        )

    def prefill_alone(tokens: int, *, snapshot: bool) -> Case:
        """What no library has beside us: a prefill that leaves a state halfway, or one in the deterministic mode."""
        convolved, rest = inputs(tokens)
        pool = rule_pool(s, 3)
        slots, starts, initial = fresh((tokens,))
        halfway = (int32([2]), int32([tokens // 2 // CHUNK_SIZE * CHUNK_SIZE])) if snapshot else ()

        def call(own: Tensor) -> Tensor:
            arguments = *split(convolved), *rest, own, slots, starts, initial
            return qnext_kernels.gated_delta_rule_prefill(*arguments, *halfway)

        def ours(i: int) -> Tensor:
            with nullcontext() if snapshot else deterministic():
                return call(pool)

        def of_reference() -> tuple[Tensor, ...]:
            own = pool.clone()
            return call(own), own[1:2]

        moved = 2 * tokens * (s.channels + value_dims) + (1 + snapshot) * one_state
        # The reference does not serve in the deterministic mode.
        part = None if snapshot else Part(of_reference, lambda out, states: (out, *states))
        return case(ours, pool, [int32([1, 2][: 1 + snapshot])], "", lambda *_: None, tokens, moved, part)

    def decode(batch: int) -> Case:
        convolved, rest = inputs(batch)
        sets = rotations(batch * one_state)
        pool = rule_pool(s, 1 + sets * batch)
        slots = [int32(1 + n * batch + torch.arange(batch)) for n in range(sets)]
        starts = int32(torch.arange(batch + 1))
        return case(
            lambda i: qnext_kernels.gated_delta_rule_decode(*split(convolved), *rest, pool, slots[i % sets]),
            pool,
            slots,
            "decode",
            lambda call, own, i: call(convolved, *rest, own, slots[i % sets], starts),
            batch,
            2 * batch * one_state,
        )

    def verify(batch: int) -> Case:
        tokens = 1 + s.drafts
        convolved, rest = inputs(batch * tokens)
        sets = rotations(batch * tokens * one_state)
        pool = rule_pool(s, 1 + sets * batch * tokens)
        # Each a tensor of its own: FlashInfer takes indices from aligned addresses alone.
        slots = [int32(1 + n * batch * tokens + torch.arange(batch * tokens)).view(batch, tokens) for n in range(sets)]
        last = verify_starts(s, batch), accepted(batch)
        return case(
            lambda i: qnext_kernels.gated_delta_rule_verify(*split(convolved), *rest, pool, slots[i % sets], *last),
            pool,
            slots,
            "verify",
            lambda call, own, i: call(convolved, *rest, own, slots[i % sets], *last),
            batch * tokens,
            (1 + tokens) * batch * one_state,
        )

    row = partial(Row, operation="gated_delta_rule")
    for lengths in (*((tokens,) for tokens in s.prefills), *s.packed):
        small = sum(lengths) <= 2048
        yield row("delta rule prefill", described(lengths), partial(prefill, lengths), quick=small, heavy=not small)
    for tokens in s.prefills_alone:
        yield row("delta rule prefill, a snapshot", f"T={tokens}", partial(prefill_alone, tokens, snapshot=True))
        alone = partial(prefill_alone, tokens, snapshot=False)
        yield row("delta rule prefill, deterministic", f"T={tokens}", alone, heavy=True, borrowed=OTHER_PREFILLS)
    for batch in s.batches:
        yield row("delta rule decode", f"B={batch}", partial(decode, batch), stepped=True, borrowed=OTHER_PREFILLS)
    for batch in s.batches:
        shape = f"B={batch} × {1 + s.drafts} tokens"
        yield row("delta rule verify", shape, partial(verify, batch), stepped=True, borrowed=OTHER_PREFILLS)
