"""Rows of experts, attention, convolution, delta rule and linear layers.

To add an operation, write a function that yields :class:`Row` and name it in :data:`GROUPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import qnext_kernels
from qnext_kernels.dispatch import OPERATIONS
from qnext_plugins.cli.bench.elementwise import elementwise_rows
from qnext_plugins.cli.bench.inputs import BLOCK_SIZE, Case, Library, Row, Side, Sizes, int32, normal, sides_of
from qnext_plugins.cli.bench.roofs import Call, rotations

# Weights.


class Stored:
    """Weights as a checkpoint has them, and a copy as our engines' sides keep them: packed, on huge pages."""

    def __init__(self, weights: tuple[Tensor, ...], pack: Callable[..., bool]) -> None:
        qnext_kernels.use_huge_pages(*weights)
        copies = tuple(weight.clone() for weight in weights)
        qnext_kernels.use_huge_pages(*copies)
        self.plain, self.packed = weights, copies if pack(*copies) else None

    def read(self, operation: str, function: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> Tensor:
        """Call ``function(x, *weights, *rest)`` with what the backend that serves reads."""
        packed = self.packed if OPERATIONS[operation].select(x.device, x.dtype).name == "native" else None
        return function(x, *(packed or self.plain), *rest, packed=packed is not None)


# Routed experts.


def balanced_routing(tokens: int, experts: int, top_k: int) -> Tensor:
    """[tokens, top_k] int32: every expert equally often, up to one, and no expert twice for a token."""
    stream = torch.randperm(experts)
    while len(stream) < tokens * top_k:
        more = torch.randperm(experts)
        # The token that spans two permutations must not meet an expert in both.
        open_token = stream[len(stream) - len(stream) % top_k :]
        first = more[: (top_k - len(open_token)) % top_k]
        if not torch.isin(first, open_token).any():
            stream = torch.cat([stream, more])
    return stream[: tokens * top_k].view(tokens, top_k).int()


def experts_rows(s: Sizes, libraries: Sequence[Library]) -> Iterator[Row]:
    @cache
    def weights() -> tuple[Stored, dict[str, tuple[str, Callable[..., None]]]]:
        w13 = normal(s.experts, 2 * s.intermediate, s.hidden, scale=0.02)
        w2 = normal(s.experts, s.hidden, s.intermediate, scale=0.02)
        packed = {each.name: found for each in libraries if (found := each.experts(w13, w2)) is not None}
        return Stored((w13, w2), qnext_kernels.pack_experts_), packed

    def build(tokens: int) -> Case:
        stored, packed = weights()
        one_expert = 3 * s.intermediate * s.hidden * 2
        sets = min(rotations(one_expert * min(s.experts, tokens * s.top_k), 64 << 30), 64)
        ids = balanced_routing(sets * tokens, s.experts, s.top_k).view(sets, tokens, s.top_k)
        read = one_expert * sum(len(each.unique()) for each in ids) / sets
        scores = torch.softmax(torch.randn(sets, tokens, s.top_k), dim=-1)
        x = normal(tokens, s.hidden)
        out = torch.empty_like(x)
        # Half the sets apart, so that no side finds the experts that another has just read.
        apart = sets // 2

        def side(name: str, function: Callable[..., None]) -> Side:
            def run(i: int) -> Tensor:
                turn = (i + apart if i else 0) % sets
                function(out, x, scores[turn], ids[turn])
                return out

            return Side(name, run)

        return Case(
            lambda i: stored.read("moe", qnext_kernels.experts, x, scores[i % sets], ids[i % sets]),
            {library: side(*found) for library, found in packed.items()},
            flops=tokens * s.top_k * 6 * s.hidden * s.intermediate,
            moved=read + 2 * x.nbytes,
        )

    for tokens in s.expert_tokens:
        yield Row("experts", f"M={tokens}", partial(build, tokens), "moe", quick=tokens <= 2048, heavy=tokens > 32)


# Attention over the paged cache.


class OurAttention:
    """Ours over a paged cache of one sequence in the layout of vLLM's pages, keys and values as they come."""

    def __init__(self, key: Tensor, value: Tensor, queries: int) -> None:
        context, kv_heads, dim = key.shape
        blocks = -(-context // BLOCK_SIZE)
        cache = torch.zeros(blocks + 1, kv_heads, 2 * BLOCK_SIZE, dim, dtype=key.dtype)
        keys, values = (half.transpose(1, 2) for half in cache.chunk(2, dim=2))
        self.caches = keys, values
        slots = int32(torch.arange(BLOCK_SIZE, BLOCK_SIZE + context))
        qnext_kernels.store_kv(key, value, *self.caches, slots)
        self.batch = int32([range(1, blocks + 1)]), int32([context]), int32([0, queries])

    def __call__(self, query: Tensor) -> Tensor:
        return qnext_kernels.paged_attention(query, *self.caches, *self.batch, query.shape[2] ** -0.5)


def schedule(turns: Sequence[Any]) -> None:
    """Divide the work of each among the threads anew."""
    for turn in turns:
        turn.schedule()


def attention_rows(s: Sizes, libraries: Sequence[Library]) -> Iterator[Row]:
    def build(queries: int, context: int) -> Case:
        key, value = normal(context, s.kv_heads, s.head_dim), normal(context, s.kv_heads, s.head_dim)
        query = normal(queries, s.heads, s.head_dim)
        out = torch.empty_like(query)
        # Several caches in turn where one would stay in the processor's; a prefill is bound by its products.
        sets = rotations(2 * key.nbytes) if queries == 1 else 1

        def side(library: Library) -> Side | None:
            turns = [library.attention(key, value, queries, s.heads) for _ in range(sets)]
            if turns[0] is None:
                return None
            return Side(
                turns[0].name,
                lambda i: turns[i % sets](query, out),
                retune=lambda: schedule(turns),
            )

        peers = sides_of(libraries, side)
        ours = [OurAttention(key, value, queries) for _ in range(sets)]
        scores = context if queries == 1 else queries * (queries + 1) // 2
        return Case(
            lambda i: ours[i % sets](query),
            peers,
            flops=4 * s.heads * s.head_dim * scores,
            moved=2 * key.nbytes + 2 * query.nbytes,
        )

    for tokens in s.prefills:
        row = partial(Row, "attention prefill", f"T={tokens}", partial(build, tokens, tokens), "paged_attention")
        yield row(quick=tokens <= 2048, heavy=tokens > 512)
    for context in s.contexts:
        yield Row("attention decode", f"B=1 context={context}", partial(build, 1, context), "paged_attention")


# Gated DeltaNet: convolution and delta rule.


def _heads(s: Sizes) -> tuple[int, int, int]:
    return s.key_heads, s.value_heads, s.linear_dim


def _accepted(batch: int) -> Tensor:
    return torch.full((batch,), 2).int()


def _verify_starts(s: Sizes, batch: int) -> Tensor:
    tokens = 1 + s.drafts
    return int32(torch.arange(0, tokens * batch + 1, tokens))


def conv_rows(s: Sizes, libraries: Sequence[Library]) -> Iterator[Row]:
    weight = normal(s.channels, s.conv_width, scale=0.5)

    def case(
        ours: Call, pool: Tensor, peer_call: Callable[[Any, int], Any], tokens: int, sequences: int, columns: int
    ) -> Case:
        def side(library: Library) -> Side | None:
            own = pool.clone()
            layer = library.convolution(weight, own, _heads(s))
            if layer is None:
                return None
            before = own.clone()
            name = layer.name(lambda: peer_call(layer, 0))
            own.copy_(before)
            return Side(name, lambda i: peer_call(layer, i), lambda: [own[:, :columns]])

        return Case(
            ours,
            sides_of(libraries, side),
            flops=2 * s.conv_width * tokens * s.channels,
            moved=2 * s.channels * (2 * tokens + 2 * sequences * pool.shape[1]),
            pools=(pool,),
            states=lambda: [pool[:, :columns]],
        )

    def make_pool(slots: int, speculation: bool) -> Tensor:
        """[slots, state_len, channels], channels last as vLLM lays it out by default."""
        return normal(slots, s.conv_width - 1 + (s.drafts if speculation else 0), s.channels)

    def prefill(tokens: int, speculation: bool) -> Case:
        x = [normal(tokens, s.channels) for _ in range(rotations(4 * tokens * s.channels))]
        pool = make_pool(2, speculation)
        slots, starts, initial = int32([1]), int32([0, tokens]), torch.tensor([False])
        state = pool.transpose(1, 2)
        return case(
            lambda i: qnext_kernels.causal_conv1d_prefill(x[i % len(x)], weight, state, slots, starts, initial),
            pool,
            lambda layer, i: layer.convolve(x[(i + 1 if i else 0) % len(x)], slots, starts, speculation),
            tokens,
            1,
            s.conv_width - 1,
        )

    def decode(batch: int) -> Case:
        x, slots, pool = batched(batch, 1, speculation=False)
        state = pool.transpose(1, 2)
        return case(
            lambda i: qnext_kernels.causal_conv1d_decode(x, weight, state, slots[i % len(slots)]),
            pool,
            lambda layer, i: layer.convolve(x, slots[i % len(slots)], None, False),
            batch,
            batch,
            s.conv_width - 1,
        )

    def verify(batch: int) -> Case:
        x, slots, pool = batched(batch, 1 + s.drafts, speculation=True)
        rest, state = (_verify_starts(s, batch), _accepted(batch)), pool.transpose(1, 2)
        return case(
            lambda i: qnext_kernels.causal_conv1d_verify(x, weight, state, slots[i % len(slots)], *rest),
            pool,
            lambda layer, i: layer.verify(x, slots[i % len(slots)][:, None], *rest),
            (1 + s.drafts) * batch,
            batch,
            pool.shape[1],
        )

    def batched(batch: int, tokens: int, speculation: bool) -> tuple[Tensor, list[Tensor], Tensor]:
        sets = rotations(batch * s.channels * 2 * 5)
        slots = [int32(1 + n * batch + torch.arange(batch)) for n in range(sets)]
        return normal(batch * tokens, s.channels), slots, make_pool(1 + sets * batch, speculation)

    row = partial(Row, operation="causal_conv1d")
    for tokens in s.conv_prefills:
        yield row("conv prefill", f"T={tokens}", partial(prefill, tokens, False))
    yield row("conv prefill, speculation", f"T={s.conv_prefills[0]}", partial(prefill, s.conv_prefills[0], True))
    for batch in s.batches:
        yield row("conv decode", f"B={batch}", partial(decode, batch))
    for batch in s.batches:
        yield row("conv verify", f"B={batch} × {1 + s.drafts} tokens", partial(verify, batch))


def delta_rule_rows(s: Sizes, libraries: Sequence[Library]) -> Iterator[Row]:
    key_dims, value_dims = s.key_heads * s.linear_dim, s.value_heads * s.linear_dim
    state_bytes = s.value_heads * s.linear_dim**2 * 4

    def inputs(tokens: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """What the convolution leaves, then a, b, A_log and dt_bias."""
        a, b = normal(tokens, s.value_heads), normal(tokens, s.value_heads)
        return normal(tokens, s.channels), (a, b, torch.rand(s.value_heads), normal(s.value_heads))

    def split(convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = convolved.split([key_dims, key_dims, value_dims], dim=1)
        q, k, v = (part.unflatten(1, (-1, s.linear_dim)) for part in parts)
        return q, k, v

    def make_pool(slots: int) -> Tensor:
        pool = (torch.randn(s.value_heads * s.linear_dim**2) * 0.1).expand(slots, -1).contiguous()
        return pool.view(slots, s.value_heads, s.linear_dim, s.linear_dim)

    def case(
        ours: Call, pool: Tensor, method: str, peer_call: Callable[[Any, Tensor, int], Any], tokens: int, moved: float
    ) -> Case:
        def side(library: Library) -> Side | None:
            layer = library.delta_rule(_heads(s))
            if layer is None or method not in layer.names:
                return None
            call = getattr(layer, method)
            own = pool.transpose(2, 3).contiguous() if layer.key_first else pool.clone()
            return Side(
                layer.names[method],
                lambda i: peer_call(call, own, i),
                lambda: [own.transpose(2, 3) if layer.key_first else own],
            )

        return Case(
            ours,
            sides_of(libraries, side),
            # The recurrence itself; the chunked form does 1.4 times as much.
            flops=tokens * s.value_heads * 7 * s.linear_dim**2,
            moved=moved,
            pools=(pool,),
            states=lambda: [pool],
        )

    def prefill(tokens: int) -> Case:
        convolved, rest = inputs(tokens)
        pool = make_pool(2)
        slots, starts, initial = int32([1]), int32([0, tokens]), torch.tensor([False])
        return case(
            lambda i: qnext_kernels.gated_delta_rule_prefill(*split(convolved), *rest, pool, slots, starts, initial),
            pool,
            "prefill",
            lambda call, own, i: call(convolved, *rest, own, slots, starts),
            tokens,
            2 * tokens * (s.channels + value_dims) + state_bytes,
        )

    def decode(batch: int) -> Case:
        convolved, rest = inputs(batch)
        sets = rotations(batch * state_bytes)
        pool = make_pool(1 + sets * batch)
        slots = [int32(1 + n * batch + torch.arange(batch)) for n in range(sets)]
        starts = int32(torch.arange(batch + 1))
        return case(
            lambda i: qnext_kernels.gated_delta_rule_decode(*split(convolved), *rest, pool, slots[i % sets]),
            pool,
            "decode",
            lambda call, own, i: call(convolved, *rest, own, slots[i % sets], starts),
            batch,
            2 * batch * state_bytes,
        )

    def verify(batch: int) -> Case:
        tokens = 1 + s.drafts
        convolved, rest = inputs(batch * tokens)
        sets = rotations(batch * tokens * state_bytes)
        pool = make_pool(1 + sets * batch * tokens)
        slots = int32(1 + torch.arange(sets * batch * tokens)).view(sets, batch, tokens)
        last = _verify_starts(s, batch), _accepted(batch)
        return case(
            lambda i: qnext_kernels.gated_delta_rule_verify(*split(convolved), *rest, pool, slots[i % sets], *last),
            pool,
            "verify",
            lambda call, own, i: call(convolved, *rest, own, slots[i % sets], *last),
            batch * tokens,
            (1 + tokens) * batch * state_bytes,
        )

    row = partial(Row, operation="gated_delta_rule")
    for tokens in s.prefills:
        small = tokens <= 2048
        yield row("delta rule prefill", f"T={tokens}", partial(prefill, tokens), quick=small, heavy=not small)
    for batch in s.batches:
        yield row("delta rule decode", f"B={batch}", partial(decode, batch))
    for batch in s.batches:
        yield row("delta rule verify", f"B={batch} × {1 + s.drafts} tokens", partial(verify, batch))


# Linear layers of decode size.


def linear_rows(s: Sizes, libraries: Sequence[Library]) -> Iterator[Row]:
    Layer = tuple[Stored, dict[str, tuple[str, Callable[[Tensor], Tensor]]]]

    def layer(n: int, k: int) -> Callable[[], list[Layer]]:
        @cache
        def make() -> list[Layer]:
            weights = [normal(n, k, scale=0.02) for _ in range(rotations(2 * n * k))]
            return [
                (
                    Stored((weight,), qnext_kernels.pack_weight_),
                    {each.name: found for each in libraries if (found := each.linear(weight)) is not None},
                )
                for weight in weights
            ]

        return make

    def build(layers: Callable[[], list[Layer]], tokens: int, n: int, k: int) -> Case:
        turns, x = layers(), normal(tokens, k)
        apart = len(turns) // 2

        def side(library: str) -> Side:
            calls = [peers[library][1] for _, peers in turns]
            return Side(turns[0][1][library][0], lambda i: calls[(i + apart if i else 0) % len(calls)](x))

        return Case(
            lambda i: turns[i % len(turns)][0].read("linear", qnext_kernels.linear, x),
            {library: side(library) for library in turns[0][1]},
            flops=2 * tokens * n * k,
            moved=2 * (n * k + tokens * (n + k)),
        )

    shapes = {
        "qkvz": (s.channels + s.value_heads * s.linear_dim, s.hidden),
        "out": (s.hidden, s.value_heads * s.linear_dim),
        "lm_head": (s.vocabulary, s.hidden),
    }
    for name, (n, k) in shapes.items():
        layers = layer(n, k)
        for tokens in (1, 2, 3, 4):
            built = partial(build, layers, tokens, n, k)
            yield Row(f"linear {name}", f"M={tokens} {k}→{n}", built, "linear", quick=tokens in (1, 4))


GROUPS: tuple[Callable[[Sizes, Sequence[Library]], Iterator[Row]], ...] = (
    experts_rows,
    attention_rows,
    delta_rule_rows,
    conv_rows,
    linear_rows,
    elementwise_rows,
)
"""In the order of the table; what the rows of a group share is freed behind the last."""
