"""Rows of ``cpu_ops.py``: experts, attention, convolution, delta rule, linear layers.

To add an operation, write a function that yields :class:`Row` and name it in :data:`GROUPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import cpu_peers as peers
import torch
from cpu_elementwise import elementwise_rows
from cpu_inputs import Case, Row, Sizes, int32, normal
from cpu_roof import Call, rotations
from torch import Tensor

import qnext_kernels

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


def experts_rows(s: Sizes) -> Iterator[Row]:
    @cache
    def weights() -> tuple[Tensor, Tensor, str, Callable[..., None]]:
        w13 = normal(s.experts, 2 * s.intermediate, s.hidden, scale=0.02)
        w2 = normal(s.experts, s.hidden, s.intermediate, scale=0.02)
        packed = peers.experts(w13, w2)
        # As our engines' sides do.
        qnext_kernels.use_huge_pages(w13, w2)
        qnext_kernels.pack_experts_(w13, w2)
        return w13, w2, *packed

    def build(tokens: int) -> Case:
        w13, w2, name, peer = weights()
        one_expert = 3 * s.intermediate * s.hidden * 2
        sets = min(rotations(one_expert * min(s.experts, tokens * s.top_k), 64 << 30), 64)
        ids = balanced_routing(sets * tokens, s.experts, s.top_k).view(sets, tokens, s.top_k)
        read = one_expert * sum(len(each.unique()) for each in ids) / sets
        scores = torch.softmax(torch.randn(sets, tokens, s.top_k), dim=-1)
        x = normal(tokens, s.hidden)
        out = torch.empty_like(x)

        def run_peer(i: int) -> Tensor:
            peer(out, x, scores[i % sets], ids[i % sets])
            return out

        # Half the sets apart, so that neither side finds the experts that the other has just read.
        apart = sets // 2
        return Case(
            name,
            ours=lambda i: qnext_kernels.experts(x, w13, w2, scores[i % sets], ids[i % sets], packed=True),
            peer=lambda i: run_peer(i + apart if i else 0),
            flops=tokens * s.top_k * 6 * s.hidden * s.intermediate,
            moved=read + 2 * x.nbytes,
        )

    for tokens in s.expert_tokens:
        yield Row("experts", f"M={tokens}", partial(build, tokens), quick=tokens <= 2048)


# Attention over the paged cache.


class OurAttention:
    """Ours over a paged cache of one sequence in the layout of vLLM's pages, keys and values as they come."""

    def __init__(self, key: Tensor, value: Tensor, queries: int) -> None:
        context, kv_heads, dim = key.shape
        blocks = -(-context // peers.BLOCK_SIZE)
        cache = torch.zeros(blocks + 1, kv_heads, 2 * peers.BLOCK_SIZE, dim, dtype=key.dtype)
        self.caches = [half.transpose(1, 2) for half in cache.chunk(2, dim=2)]
        slots = int32(torch.arange(peers.BLOCK_SIZE, peers.BLOCK_SIZE + context))
        qnext_kernels.store_kv(key, value, *self.caches, slots)
        self.batch = int32([range(1, blocks + 1)]), int32([context]), int32([0, queries])

    def __call__(self, query: Tensor) -> Tensor:
        return qnext_kernels.paged_attention(query, *self.caches, *self.batch, query.shape[2] ** -0.5)


def attention_rows(s: Sizes) -> Iterator[Row]:
    def build(queries: int, context: int) -> Case:
        key, value = normal(context, s.kv_heads, s.head_dim), normal(context, s.kv_heads, s.head_dim)
        query = normal(queries, s.heads, s.head_dim)
        out = torch.empty_like(query)
        # Several caches in turn where one would stay in the processor's; a prefill is bound by its products.
        sets = rotations(2 * key.nbytes) if queries == 1 else 1
        peer = [peers.PagedAttention(key, value, queries, s.heads) for _ in range(sets)]
        ours = [OurAttention(key, value, queries) for _ in range(sets)]
        scores = context if queries == 1 else queries * (queries + 1) // 2
        return Case(
            peer[0].name,
            ours=lambda i: ours[i % sets](query),
            peer=lambda i: peer[i % sets](query, out),
            flops=4 * s.heads * s.head_dim * scores,
            moved=2 * key.nbytes + 2 * query.nbytes,
            retune=lambda: [each.schedule() for each in peer],
        )

    for tokens in s.prefills:
        yield Row("attention prefill", f"T={tokens}", partial(build, tokens, tokens), quick=tokens <= 2048)
    for context in s.contexts:
        yield Row("attention decode", f"B=1 context={context}", partial(build, 1, context))


# Gated DeltaNet: convolution and delta rule.


def _conv_pool(s: Sizes, slots: int, speculation: bool) -> Tensor:
    """[slots, state_len, channels], channels last as vLLM lays it out by default."""
    return normal(slots, s.conv_width - 1 + (s.drafts if speculation else 0), s.channels)


def _layer(s: Sizes, weight: Tensor, pool: Tensor) -> peers.DeltaNetLayer:
    return peers.DeltaNetLayer(weight, pool, (s.key_heads, s.value_heads, s.linear_dim))


def conv_rows(s: Sizes) -> Iterator[Row]:
    weight = normal(s.channels, s.conv_width, scale=0.5)

    def case(ours: Call, peer: Call, tokens: int, sequences: int, pools: tuple[Tensor, Tensor], columns: int) -> Case:
        before = pools[1].clone()
        name = peers.convolution_name(peer)
        pools[1].copy_(before)
        return Case(
            name,
            ours,
            peer,
            flops=2 * s.conv_width * tokens * s.channels,
            moved=2 * s.channels * (2 * tokens + 2 * sequences * pools[0].shape[1]),
            states=lambda: [tuple(pool[:, :columns] for pool in pools)],
        )

    def prefill(tokens: int, speculation: bool) -> Case:
        x = [normal(tokens, s.channels) for _ in range(rotations(4 * tokens * s.channels))]
        pool = _conv_pool(s, 2, speculation)
        pools, state = (pool, pool.clone()), pool.transpose(1, 2)
        layer = _layer(s, weight, pools[1])
        slots, starts, initial = int32([1]), int32([0, tokens]), torch.tensor([False])
        return case(
            lambda i: qnext_kernels.causal_conv1d_prefill(x[i % len(x)], weight, state, slots, starts, initial),
            lambda i: layer.convolve(x[(i + 1 if i else 0) % len(x)], slots, starts, speculation),
            tokens,
            1,
            pools,
            s.conv_width - 1,
        )

    def decode(batch: int) -> Case:
        x, slots, pools, layer, state = batched(batch, 1, speculation=False)
        return case(
            lambda i: qnext_kernels.causal_conv1d_decode(x, weight, state, slots[i % len(slots)]),
            lambda i: layer.convolve(x, slots[i % len(slots)], None, False),
            batch,
            batch,
            pools,
            s.conv_width - 1,
        )

    def verify(batch: int) -> Case:
        tokens = 1 + s.drafts
        x, slots, pools, layer, state = batched(batch, tokens, speculation=True)
        starts, accepted = int32(torch.arange(0, tokens * batch + 1, tokens)), torch.full((batch,), 2).int()
        return case(
            lambda i: qnext_kernels.causal_conv1d_verify(x, weight, state, slots[i % len(slots)], starts, accepted),
            lambda i: layer.verify(x, slots[i % len(slots)][:, None], starts, accepted),
            tokens * batch,
            batch,
            pools,
            pools[0].shape[1],
        )

    def batched(batch: int, tokens: int, speculation: bool) -> tuple:
        sets = rotations(batch * s.channels * 2 * 5)
        pool = _conv_pool(s, 1 + sets * batch, speculation)
        slots = [int32(1 + n * batch + torch.arange(batch)) for n in range(sets)]
        pools = (pool, pool.clone())
        return normal(batch * tokens, s.channels), slots, pools, _layer(s, weight, pools[1]), pool.transpose(1, 2)

    for tokens in s.conv_prefills:
        yield Row("conv prefill", f"T={tokens}", partial(prefill, tokens, False))
    yield Row("conv prefill, speculation", f"T={s.conv_prefills[0]}", partial(prefill, s.conv_prefills[0], True))
    for batch in s.batches:
        yield Row("conv decode", f"B={batch}", partial(decode, batch))
    for batch in s.batches:
        yield Row("conv verify", f"B={batch} × {1 + s.drafts} tokens", partial(verify, batch))


def delta_rule_rows(s: Sizes) -> Iterator[Row]:
    key_dims, value_dims = s.key_heads * s.linear_dim, s.value_heads * s.linear_dim
    state_bytes = s.value_heads * s.linear_dim**2 * 4

    def inputs(tokens: int) -> tuple[Tensor, ...]:
        A_log, dt_bias = torch.rand(s.value_heads), normal(s.value_heads)
        return normal(tokens, s.channels), normal(tokens, s.value_heads), normal(tokens, s.value_heads), A_log, dt_bias

    def split(convolved: Tensor) -> Iterator[Tensor]:
        for part in convolved.split([key_dims, key_dims, value_dims], dim=1):
            yield part.unflatten(1, (-1, s.linear_dim))

    def pools(slots: int) -> tuple[Tensor, Tensor]:
        ours = (torch.randn(s.value_heads * s.linear_dim**2) * 0.1).expand(slots, -1).contiguous()
        ours = ours.view(slots, s.value_heads, s.linear_dim, s.linear_dim)
        return ours, ours.transpose(2, 3).contiguous()

    def case(name: str, ours: Call, peer: Call, tokens: int, moved: float, both: tuple[Tensor, Tensor]) -> Case:
        return Case(
            name,
            ours,
            peer,
            # The recurrence itself; the chunked form does 1.4 times as much.
            flops=tokens * s.value_heads * 7 * s.linear_dim**2,
            moved=moved,
            states=lambda: [(both[0], both[1].transpose(2, 3))],
        )

    def layer() -> peers.DeltaNetLayer:
        return _layer(s, normal(s.channels, s.conv_width), _conv_pool(s, 1, False))

    def prefill(tokens: int) -> Case:
        convolved, *rest = inputs(tokens)
        both, like_vllm = pools(2), layer()
        slots, starts, initial = int32([1]), int32([0, tokens]), torch.tensor([False])
        return case(
            "chunk_gated_delta_rule_cpu",
            lambda i: qnext_kernels.gated_delta_rule_prefill(*split(convolved), *rest, both[0], slots, starts, initial),
            lambda i: peers.delta_rule_prefill(like_vllm, convolved, *rest, both[1], slots, starts),
            tokens,
            2 * tokens * (s.channels + value_dims) + state_bytes,
            both,
        )

    def decode(batch: int) -> Case:
        convolved, *rest = inputs(batch)
        sets = rotations(batch * state_bytes)
        both, like_vllm = pools(1 + sets * batch), layer()
        slots = [int32(1 + n * batch + torch.arange(batch)) for n in range(sets)]
        starts = int32(torch.arange(batch + 1))
        return case(
            "fused_sigmoid_gating_delta_rule_update_cpu",
            lambda i: qnext_kernels.gated_delta_rule_decode(*split(convolved), *rest, both[0], slots[i % sets]),
            lambda i: peers.delta_rule_decode(like_vllm, convolved, *rest, both[1], slots[i % sets], starts),
            batch,
            2 * batch * state_bytes,
            both,
        )

    def verify(batch: int) -> Case:
        tokens = 1 + s.drafts
        convolved, *rest = inputs(batch * tokens)
        sets = rotations(batch * tokens * state_bytes)
        both, like_vllm = pools(1 + sets * batch * tokens), layer()
        slots = int32(1 + torch.arange(sets * batch * tokens)).view(sets, batch, tokens)
        starts, accepted = int32(torch.arange(0, tokens * batch + 1, tokens)), torch.full((batch,), 2).int()
        return case(
            "fused_sigmoid_gating_delta_rule_update_spec_cpu",
            lambda i: qnext_kernels.gated_delta_rule_verify(
                *split(convolved), *rest, both[0], slots[i % sets], starts, accepted
            ),
            lambda i: peers.delta_rule_verify(like_vllm, convolved, *rest, both[1], slots[i % sets], starts, accepted),
            batch * tokens,
            (1 + tokens) * batch * state_bytes,
            both,
        )

    for tokens in s.prefills:
        yield Row("delta rule prefill", f"T={tokens}", partial(prefill, tokens), quick=tokens <= 2048)
    for batch in s.batches:
        yield Row("delta rule decode", f"B={batch}", partial(decode, batch))
    for batch in s.batches:
        yield Row("delta rule verify", f"B={batch} × {1 + s.drafts} tokens", partial(verify, batch))


# Linear layers of decode size.


def _packed(weight: Tensor) -> Tensor:
    """A copy as our engines' sides keep it."""
    copy = weight.clone()
    qnext_kernels.use_huge_pages(copy)
    qnext_kernels.pack_weight_(copy)
    return copy


def linear_rows(s: Sizes) -> Iterator[Row]:
    def layer(n: int, k: int) -> Callable[[], list[tuple[Tensor, str, Callable[[Tensor], Tensor]]]]:
        @cache
        def make() -> list[tuple[Tensor, str, Callable[[Tensor], Tensor]]]:
            weights = [normal(n, k, scale=0.02) for _ in range(rotations(2 * n * k))]
            return [(_packed(weight), *peers.linear(weight)) for weight in weights]

        return make

    def build(layers: Callable[[], list], tokens: int, n: int, k: int) -> Case:
        turns, x = layers(), normal(tokens, k)
        apart = len(turns) // 2
        return Case(
            turns[0][1],
            ours=lambda i: qnext_kernels.linear(x, turns[i % len(turns)][0], packed=True),
            peer=lambda i: turns[(i + apart if i else 0) % len(turns)][2](x),
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
            yield Row(f"linear {name}", f"M={tokens} {k}→{n}", partial(build, layers, tokens, n, k), tokens in (1, 4))


GROUPS: tuple[Callable[[Sizes], Iterator[Row]], ...] = (
    experts_rows,
    attention_rows,
    delta_rule_rows,
    conv_rows,
    linear_rows,
    elementwise_rows,
)
"""In the order of the table; what the rows of a group share is freed behind the last."""
