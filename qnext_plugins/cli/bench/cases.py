"""Rows of experts, attention and linear layers, and the list of all groups of rows.

To add an operation, write a function that yields :class:`Row` and name it in :data:`GROUPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import qnext_kernels
from qnext_kernels.dispatch import OPERATIONS
from qnext_kernels.fp8 import FP8, FP8_GROUP
from qnext_kernels.moe import PACKING
from qnext_plugins.cli.bench.elementwise import elementwise_rows
from qnext_plugins.cli.bench.gated_delta_net import conv_rows, delta_rule_rows
from qnext_plugins.cli.bench.gated_delta_net_layer import layer_rows
from qnext_plugins.cli.bench.inputs import (
    BLOCK_SIZE,
    PART,
    STEP,
    TOLERANCE,
    Case,
    Library,
    Part,
    Row,
    Side,
    Sizes,
    int32,
    normal,
    sides_of,
)
from qnext_plugins.cli.bench.roofs import rotations

# Weights.


class Stored:
    """Weights as a checkpoint has them, and a copy for each backend that our engines' sides pack them for."""

    def __init__(self, weights: tuple[Tensor, ...], pack: Callable[..., bool]) -> None:
        qnext_kernels.use_huge_pages(*weights)
        self.plain, self._pack = weights, pack
        self._packed: dict[str, tuple[Tensor, ...] | None] = {}

    def read(
        self, operation: str, function: Callable[..., Tensor], x: Tensor, *rest: Tensor, **options: Tensor | None
    ) -> Tensor:
        """Call ``function(x, *weights, *rest, **options)`` with what the backend that serves reads."""
        backend = OPERATIONS[operation].select(x.device, x.dtype).name
        if backend not in self._packed:
            self._packed[backend] = self._copies() if backend in PACKING else None
        packed = self._packed[backend]
        return function(x, *(packed or self.plain), *rest, packed=packed is not None, **options)

    def _copies(self) -> tuple[Tensor, ...] | None:
        copies = tuple(weight.clone() for weight in self.plain)
        qnext_kernels.use_huge_pages(*copies)
        return copies if self._pack(*copies) else None


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


Routed = Callable[[Tensor, Tensor, Tensor], Tensor]
"""f(x, weights, ids)."""
Peers = dict[str, tuple[str, Callable[..., Any]]]
"""By library: the kernel's name and f(out, x, weights, ids)."""


def experts_rows(s: Sizes, libraries: Sequence[Library]) -> Iterator[Row]:
    @cache
    def weights() -> tuple[Routed, Peers]:
        w13 = normal(s.experts, 2 * s.intermediate, s.hidden, scale=0.02)
        w2 = normal(s.experts, s.hidden, s.intermediate, scale=0.02)
        peers = {each.name: found for each in libraries if (found := each.experts(w13, w2)) is not None}
        return partial(Stored((w13, w2), qnext_kernels.pack_experts_).read, "moe", qnext_kernels.experts), peers

    yield from routed_rows(s, "experts", weights, bytes_of_weight=2, compute="bf16", tolerance=TOLERANCE)


def experts_fp8_rows(s: Sizes, libraries: Sequence[Library]) -> Iterator[Row]:
    @cache
    def weights() -> tuple[Routed, Peers]:
        w13, w13_scale = fp8_blocks(s.experts, 2 * s.intermediate, s.hidden, halves=2)
        w2, w2_scale = fp8_blocks(s.experts, s.hidden, s.intermediate)
        stored = w13, w13_scale, w2, w2_scale
        peers = {each.name: found for each in libraries if (found := each.experts_fp8(*stored)) is not None}
        function = partial(qnext_kernels.experts_fp8, quantize_activations=not on_cpu())
        return partial(Stored(stored, qnext_kernels.pack_experts_fp8_).read, "moe", function), peers

    if on_cpu():
        # Activations stay what they are.
        compute, tolerance = "bf16", TOLERANCE
    else:
        # Two sides may quantize what is between the products differently: half a unit in the last place of e4m3.
        compute, tolerance = "fp8", torch.finfo(FP8).eps / 2
    yield from routed_rows(s, "experts fp8", weights, bytes_of_weight=1, compute=compute, tolerance=tolerance)


def on_cpu() -> bool:
    """Whether inputs are made on a CPU."""
    return torch.get_default_device().type == "cpu"


def fp8_blocks(experts: int, rows: int, columns: int, halves: int = 1) -> tuple[Tensor, Tensor]:
    """Weights [E, rows, columns] in e4m3 and scales of their blocks, those of each of ``halves`` apart."""
    weight = normal(experts, rows, columns).to(FP8)
    blocks = halves * -(-rows // halves // FP8_GROUP), -(-columns // FP8_GROUP)
    return weight, 0.02 * (0.5 + torch.rand(experts, *blocks))


def routed_rows(
    s: Sizes,
    op: str,
    weights: Callable[[], tuple[Routed, Peers]],
    bytes_of_weight: int,
    compute: str,
    tolerance: float,
) -> Iterator[Row]:
    def build(tokens: int) -> Case:
        ours, peers = weights()
        one_expert = 3 * s.intermediate * s.hidden * bytes_of_weight
        sets = min(rotations(one_expert * min(s.experts, tokens * s.top_k), 64 << 30), 64)
        ids = balanced_routing(sets * tokens, s.experts, s.top_k).view(sets, tokens, s.top_k)
        read = one_expert * sum(len(each.unique()) for each in ids) / sets
        scores = torch.softmax(torch.randn(sets, tokens, s.top_k), dim=-1)
        x = normal(tokens, s.hidden)
        out = torch.empty_like(x)
        # Half the sets apart, so that no side finds the experts that another has just read.
        apart = sets // 2

        def side(name: str, function: Callable[..., Any]) -> Side:
            def run(i: int) -> Tensor:
                turn = (i + apart if i else 0) % sets
                returned = function(out, x, scores[turn], ids[turn])
                return out if returned is None else returned

            return Side(name, run)

        return Case(
            lambda i: ours(x, scores[i % sets], ids[i % sets]),
            {library: side(*found) for library, found in peers.items()},
            flops=tokens * s.top_k * 6 * s.hidden * s.intermediate,
            moved=read + 2 * x.nbytes,
            sets=sets,
            part=Part(lambda: (ours(x[:PART], scores[0, :PART], ids[0, :PART]),), lambda result: (result[:PART],)),
            compute=compute,
            tolerance=tolerance,
        )

    for tokens in s.expert_tokens:
        row = partial(Row, op, f"M={tokens}", partial(build, tokens), "moe", quick=tokens <= 2048)
        yield row(heavy=tokens > 32, stepped=tokens <= STEP)


# Attention over the paged cache.


class OurAttention:
    """Ours over a paged cache of one sequence in the layout of vLLM's pages, keys and values as they come."""

    def __init__(self, key: Tensor, value: Tensor, queries: int) -> None:
        context, kv_heads, dim = key.shape
        blocks = -(-context // BLOCK_SIZE)
        cache = torch.zeros(blocks + 1, kv_heads, 2 * BLOCK_SIZE, dim, dtype=key.dtype)
        qnext_kernels.use_huge_pages(cache)  # as vLLM's own is with us
        keys, values = (half.transpose(1, 2) for half in cache.chunk(2, dim=2))
        self.caches = keys, values
        slots = int32(torch.arange(BLOCK_SIZE, BLOCK_SIZE + context))
        qnext_kernels.store_kv(key, value, *self.caches, slots)
        self.batch = int32([range(1, blocks + 1)]), int32([context]), int32([0, queries])

    def __call__(self, query: Tensor) -> Tensor:
        return qnext_kernels.paged_attention(query, *self.caches, *self.batch, query.shape[2] ** -0.5)

    def last(self, query: Tensor) -> Tensor:
        """Only the last tokens of the queries."""
        table, lengths, _ = self.batch
        batch = table, lengths, int32([0, len(query)])
        return qnext_kernels.paged_attention(query, *self.caches, *batch, query.shape[2] ** -0.5)


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
        sets = rotations(2 * key.nbytes) if queries < context else 1

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
        scores = queries * context - queries * (queries - 1) // 2
        return Case(
            lambda i: ours[i % sets](query),
            peers,
            flops=4 * s.heads * s.head_dim * scores,
            moved=2 * key.nbytes + 2 * query.nbytes,
            sets=sets,
            part=Part(lambda: (ours[0].last(query[-PART:]),), lambda result: (result[-PART:],)),
        )

    for tokens in s.prefills:
        row = partial(Row, "attention prefill", f"T={tokens}", partial(build, tokens, tokens), "paged_attention")
        yield row(quick=tokens <= 2048, heavy=tokens > 512)
    for context in s.contexts:
        row = partial(Row, "attention decode", f"B=1 context={context}", partial(build, 1, context), "paged_attention")
        yield row(stepped=True)
    for context in s.contexts:
        tokens = 1 + s.drafts
        shape = f"B=1 × {tokens} tokens context={context}"
        yield Row("attention verify", shape, partial(build, tokens, context), "paged_attention", stepped=True)


# Linear layers of decode size.


class Layer(NamedTuple):
    """A linear layer, and what other libraries make of its weight."""

    weight: Stored
    scale: Tensor | None
    peers: dict[str, tuple[str, Callable[[Tensor], Tensor]]]


def linear_rows(s: Sizes, libraries: Sequence[Library]) -> Iterator[Row]:
    def plain(n: int, k: int) -> Layer:
        weight = normal(n, k, scale=0.02)
        peers = {each.name: found for each in libraries if (found := each.linear(weight)) is not None}
        return Layer(Stored((weight,), qnext_kernels.pack_weight_), None, peers)

    def in_fp8(n: int, k: int) -> Layer:
        weight, scale = (part[0] for part in fp8_blocks(1, n, k))
        return Layer(Stored((weight,), qnext_kernels.pack_weight_), scale, {})

    def several(make: Callable[[int, int], Layer], n: int, k: int, bytes_of_weight: int) -> Callable[[], list[Layer]]:
        return cache(lambda: [make(n, k) for _ in range(rotations(bytes_of_weight * n * k))])

    def build(layers: Callable[[], list[Layer]], tokens: int, n: int, k: int, bytes_of_weight: int) -> Case:
        turns, x = layers(), normal(tokens, k)
        apart = len(turns) // 2

        def ours(i: int) -> Tensor:
            layer = turns[i % len(turns)]
            return layer.weight.read("linear", qnext_kernels.linear, x, scale=layer.scale)

        def side(library: str) -> Side:
            calls = [layer.peers[library][1] for layer in turns]
            return Side(turns[0].peers[library][0], lambda i: calls[(i + apart if i else 0) % len(calls)](x))

        return Case(
            ours,
            {library: side(library) for library in turns[0].peers},
            flops=2 * tokens * n * k,
            moved=bytes_of_weight * n * k + 2 * tokens * (n + k),
            sets=len(turns),
        )

    shapes = {
        "qkvz": (s.channels + s.value_heads * s.linear_dim, s.hidden),
        "out": (s.hidden, s.value_heads * s.linear_dim),
        "lm_head": (s.vocabulary, s.hidden),
    }
    for op, make, size in (("linear", plain, 2), ("linear fp8", in_fp8, 1)):
        for name, (n, k) in shapes.items():
            if make is in_fp8 and name == "lm_head":  # no checkpoint has that
                continue
            layers = several(make, n, k, size)
            for tokens in s.linear_tokens:
                case = partial(build, layers, tokens, n, k, size)
                row = partial(Row, f"{op} {name}", f"M={tokens} {k}→{n}", case, "linear")
                yield row(quick=tokens in (1, 4), stepped=tokens <= STEP)


GROUPS: tuple[Callable[[Sizes, Sequence[Library]], Iterator[Row]], ...] = (
    experts_rows,
    experts_fp8_rows,
    attention_rows,
    delta_rule_rows,
    conv_rows,
    layer_rows,
    linear_rows,
    elementwise_rows,
)
"""In the order of the table; what the rows of a group share is freed behind the last."""
