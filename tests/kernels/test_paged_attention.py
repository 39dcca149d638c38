"""Paged attention against float64, between its own calls bit by bit, and against bad input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from qnext_kernels import force_backend, paged_attention, store_kv
from tests.kernels.kernel_inputs import (
    DTYPES,
    NATIVE_BACKENDS,
    Bad,
    assert_close,
    memory,
    same_bits,
    start_offsets,
)

LENGTHS = (1, 2, 3, 47, 48, 49, 575, 576, 577, 1155)
"""Around every boundary of the kernel in C++: pairs of keys, blocks of 48, partitions of 576."""
BLOCK_SIZES = {"heads first": 16, "keys beside values": 32, "slots": 1}
ANYTHING = 10**6


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int


# The model's, a small one, and two whose groups and head dims fill no vector.
SHAPES = [Shape(16, 2, 256), Shape(2, 1, 32), Shape(6, 2, 20), Shape(9, 1, 72)]


class Cache(NamedTuple):
    keys: Tensor
    values: Tensor


class Tokens(NamedTuple):
    """A sequence: keys and values of all its tokens, queries and gates of the last ones."""

    q: Tensor
    gate: Tensor
    k: Tensor
    v: Tensor

    def part(self, first: int, last: int) -> Tokens:
        """As it was when queries [first, last) were its new tokens."""
        length = len(self.k) - len(self.q) + last
        return Tokens(self.q[first:last], self.gate[first:last], self.k[:length], self.v[:length])


def make_cache(layout: str, blocks: int, shape: Shape, dtype: torch.dtype) -> Cache:
    """[blocks, block_size, KV, D] of NaN."""
    size, kv_heads, head_dim = BLOCK_SIZES[layout], shape.kv_heads, shape.head_dim
    if layout == "heads first":
        return Cache(*torch.full((2, blocks, kv_heads, size, head_dim), math.nan, dtype=dtype).transpose(2, 3))
    if layout == "keys beside values":
        both = torch.full((blocks, kv_heads, size, 2 * head_dim), math.nan, dtype=dtype).transpose(1, 2)
        return Cache(both[..., :head_dim], both[..., head_dim:])
    pools = torch.full((2, blocks, kv_heads, head_dim), math.nan, dtype=dtype)
    return Cache(*pools.unsqueeze(2))


def random_tokens(shape: Shape, queries: int, length: int, dtype: torch.dtype) -> Tokens:
    q, gate = torch.randn(2, queries, shape.heads, shape.head_dim).to(dtype)
    k, v = torch.randn(2, length, shape.kv_heads, shape.head_dim).to(dtype)
    return Tokens(q, gate, k, v)


def place(batch: Sequence[Tokens], shape: Shape, layout: str) -> dict[str, Any]:
    """The arguments of a call: keys and values in shuffled blocks of a cache that is NaN elsewhere."""
    size, dtype = BLOCK_SIZES[layout], batch[0].q.dtype
    widths = [-(-len(tokens.k) // size) for tokens in batch]
    cache = make_cache(layout, sum(widths) + 2, shape, dtype)
    blocks = torch.randperm(sum(widths) + 2).int()[: sum(widths)].split(widths)
    table = torch.full((len(batch), max(widths) + 1), ANYTHING, dtype=torch.int32)
    for row, own, tokens in zip(table, blocks, batch, strict=True):
        row[: len(own)] = own
        for at in range(len(tokens.k)):
            cache.keys[own[at // size], at % size] = tokens.k[at]
            cache.values[own[at // size], at % size] = tokens.v[at]
    return {
        "q": torch.cat([tokens.q for tokens in batch]),
        "key_cache": cache.keys,
        "value_cache": cache.values,
        "block_table": table,
        "seq_lens": torch.tensor([len(tokens.k) for tokens in batch]),
        "query_start_loc": start_offsets([len(tokens.q) for tokens in batch]),
        "scale": shape.head_dim**-0.5,
        "gate": torch.cat([tokens.gate for tokens in batch]),
    }


def attend(batch: Sequence[Tokens], shape: Shape, layout: str = "slots") -> list[Tensor]:
    """Each sequence's results."""
    return list(paged_attention(**place(batch, shape, layout)).split([len(tokens.q) for tokens in batch]))


def in_float64(given: dict[str, Any]) -> dict[str, Any]:
    names = ("q", "key_cache", "value_cache", "gate")
    return given | {name: given[name].double() for name in names if given[name] is not None}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", BLOCK_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_agrees_with_float64_and_rounds_once(
    backend: str, shape: Shape, layout: str, dtype: torch.dtype, gated: bool, causal: bool
) -> None:
    counts = [min(length, (1, 3, 30)[n % 3]) for n, length in enumerate(LENGTHS)]
    batch = [random_tokens(shape, *sizes, dtype) for sizes in zip(counts, LENGTHS, strict=True)]
    batch.append(random_tokens(shape, 0, 5, dtype))
    given = place(batch, shape, layout) | {"causal": causal}
    if not gated:
        given["gate"] = None
    with force_backend("reference"):
        truth = paged_attention(**in_float64(given))
    with force_backend(backend):
        out = paged_attention(**given)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, truth, {torch.float32: shape.head_dim + max(LENGTHS)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", BLOCK_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_verify_and_decode_have_the_same_bits(shape: Shape, layout: str, dtype: torch.dtype) -> None:
    for length, queries in ((66, 66), (590, 30)):
        tokens = random_tokens(shape, queries, length, dtype)
        with force_backend("native"):
            (whole,) = attend([tokens], shape, layout)
            for step in (1, 3, 4, 5, 17):
                cuts = [(first, min(first + step, queries)) for first in range(0, queries, step)]
                if step == 1:
                    cuts = cuts[-20:]
                parts = attend([tokens.part(*cut) for cut in cuts], shape, layout)
                for (first, last), part in zip(cuts, parts, strict=True):
                    assert same_bits(part, whole[first:last])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_verify_equals_repeated_decode_bitwise(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    tokens = random_tokens(shape, 4, 130, dtype)
    with force_backend(backend):
        (verified,) = attend([tokens], shape)
        for n in range(4):
            (decoded,) = attend([tokens.part(n, n + 1)], shape)
            assert same_bits(verified[n : n + 1], decoded)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_a_sequence_does_not_depend_on_the_batch_or_on_where_it_lies(backend: str, dtype: torch.dtype) -> None:
    shape = SHAPES[1]
    batch = [random_tokens(shape, min(length, 1 + n), length, dtype) for n, length in enumerate(LENGTHS)]
    order = torch.randperm(len(batch)).tolist()
    with force_backend(backend):
        together = attend(batch, shape)
        shuffled = attend([batch[n] for n in order], shape, "heads first")
        for n, tokens in enumerate(batch):
            (alone,) = attend([tokens], shape, "keys beside values")
            assert same_bits(alone, together[n])
            assert same_bits(alone, shuffled[order.index(n)])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("sizes", [[(1, 1500)], [(3, 700), (1, 40)], [(150, 600)], [(1, 600)] * 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit_of_the_native_result(
    dtype: torch.dtype, sizes: list[tuple[int, int]]
) -> None:
    shape = SHAPES[0]
    given = place([random_tokens(shape, *size, dtype) for size in sizes], shape, "heads first")
    with force_backend("native"):
        two = paged_attention(**given)
        torch.set_num_threads(1)
        assert same_bits(two, paged_attention(**given))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, Shape(32, 1, 32)])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_later_keys_contribute_exactly_nothing(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    tokens = random_tokens(shape, 40, 80, dtype)
    with force_backend(backend):
        (before,) = attend([tokens], shape)
        tokens.k[61:], tokens.v[61:] = math.nan, math.inf
        (after,) = attend([tokens], shape)
    assert same_bits(after[:21], before[:21])
    assert after[21:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_large_scores_do_not_overflow(backend: str, dtype: torch.dtype) -> None:
    shape = SHAPES[1]
    given = place([random_tokens(shape, 2, 700, dtype)], shape, "slots") | {"scale": 1000.0}
    with force_backend("reference"):
        truth = paged_attention(**in_float64(given))
    with force_backend(backend):
        out = paged_attention(**given)
    # An error of the scores is one of the weights.
    assert_close(out, truth, {torch.float32: (10 * 1000) ** 2})


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_reads_views_and_indices_of_both_widths(backend: str) -> None:
    shape = SHAPES[1]
    given = place(
        [random_tokens(shape, 3, 20, torch.float32), random_tokens(shape, 5, 70, torch.float32)], shape, "slots"
    )
    table = torch.stack([given["block_table"], given["block_table"]], dim=1).long()
    wide = torch.cat([given["q"], given["gate"]], dim=2)
    views = {
        "q": wide[..., : shape.head_dim],
        "gate": wide[..., shape.head_dim :],
        "block_table": table[:, 0],
        "seq_lens": given["seq_lens"].int(),
        "query_start_loc": given["query_start_loc"].long(),
    }
    dims_first = {
        name: given[name].transpose(2, 3).contiguous().transpose(2, 3) for name in ("key_cache", "value_cache")
    }
    with force_backend(backend):
        out = paged_attention(**given)
        assert same_bits(paged_attention(**(given | views)), out)
        assert_close(paged_attention(**(given | dims_first)), out, {torch.float32: 2 * (shape.head_dim + 70)})


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_an_empty_batch_is_served(backend: str) -> None:
    shape = SHAPES[1]
    cache = make_cache("slots", 3, shape, torch.float32)
    none, rows = torch.empty(0, dtype=torch.int32), torch.empty(0, shape.heads, shape.head_dim)
    with force_backend(backend):
        out = paged_attention(rows, *cache, none.view(0, 4), none, start_offsets([]), 1.0)
        assert out.shape == rows.shape
        assert (
            paged_attention(rows, *cache, none.view(1, 0), none.new_zeros(1), start_offsets([0]), 1.0).shape
            == rows.shape
        )
        store_kv(rows[:, :1], rows[:, :1], *cache, none)
    assert cache.keys.isnan().all()


@pytest.mark.parametrize("slots_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("layout", BLOCK_SIZES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_store_kv_writes_the_slots_and_nothing_else(
    backend: str, layout: str, dtype: torch.dtype, slots_dtype: torch.dtype
) -> None:
    if backend == "native" and dtype not in DTYPES:
        pytest.skip("declined")
    shape, size = Shape(4, 2, 20), BLOCK_SIZES[layout]
    cache, expected = (make_cache(layout, 3 * 32 // size, shape, dtype) for _ in range(2))
    k, v = torch.randn(9, shape.kv_heads, 2 * shape.head_dim).to(dtype).chunk(2, dim=2)
    slots = torch.randperm(96)[:9].to(slots_dtype)
    slots[4] = -1
    with force_backend(backend):
        store_kv(k, v, *cache, slots)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected.keys[slot // size, slot % size] = k[t]
            expected.values[slot // size, slot % size] = v[t]
    for ours, theirs in zip(cache, expected, strict=True):
        assert torch.equal(memory(ours), memory(theirs))


BAD_CACHES = [
    Bad("key_cache", "of another head dim", lambda x: x[..., :-1], ValueError),
    Bad("key_cache", "three dimensions", lambda x: x[:, 0], ValueError),
    Bad("key_cache", "another dtype", lambda x: x.double(), TypeError),
    Bad("key_cache", "blocks of nothing", lambda x: x[:, :0], ValueError),
    Bad("value_cache", "of fewer blocks", lambda x: x[:-1], ValueError),
    Bad("value_cache", "another dtype", lambda x: x.bfloat16(), TypeError),
]
BAD_ATTENTION = [
    *BAD_CACHES,
    Bad("q", "two dimensions", lambda x: x[0], ValueError),
    Bad("q", "integers", lambda x: x.long(), TypeError),
    Bad("q", "heads that no group divides", lambda x: x[:, :-1], ValueError),
    Bad("block_table", "of fewer sequences", lambda x: x[:-1], ValueError),
    Bad("block_table", "one dimension", lambda x: x[0], ValueError),
    Bad("block_table", "floats", lambda x: x.float(), TypeError),
    Bad("block_table", "beyond the cache", lambda x: x + 99, IndexError),
    Bad("block_table", "below 0", lambda x: x - 99, IndexError),
    Bad("seq_lens", "of fewer sequences", lambda x: x[:-1], ValueError),
    Bad("seq_lens", "floats", lambda x: x.float(), TypeError),
    Bad("seq_lens", "fewer than the new tokens", lambda x: x * torch.tensor([1, 0]), ValueError),
    Bad("seq_lens", "more than the table holds", lambda x: x + 99, ValueError),
    Bad("query_start_loc", "falling", lambda x: x[[0, 2, 1]], ValueError),
    Bad("query_start_loc", "beyond the tokens", lambda x: x + torch.tensor([0, 0, 1]), ValueError),
    Bad("query_start_loc", "not from 0", lambda x: x + torch.tensor([1, 0, 0]), ValueError),
    Bad("query_start_loc", "floats", lambda x: x.float(), TypeError),
    Bad("gate", "of fewer heads", lambda x: x[:, :-1], ValueError),
    Bad("gate", "another dtype", lambda x: x.bfloat16(), TypeError),
]
BAD_STORE = [
    *BAD_CACHES,
    Bad("k", "two dimensions", lambda x: x[0], ValueError),
    Bad("k", "integers", lambda x: x.long(), TypeError),
    Bad("v", "of fewer heads", lambda x: x[:, :-1], ValueError),
    Bad("v", "another dtype", lambda x: x.bfloat16(), TypeError),
    Bad("slot_mapping", "of fewer tokens", lambda x: x[:-1], ValueError),
    Bad("slot_mapping", "floats", lambda x: x.float(), TypeError),
    Bad("slot_mapping", "beyond the cache", lambda x: x + 99, IndexError),
    Bad("slot_mapping", "below −1", lambda x: x - 99, IndexError),
]


@pytest.mark.parametrize("bad", BAD_ATTENTION, ids=str)
def test_bad_input_is_refused_by_name(bad: Bad) -> None:
    shape = Shape(4, 2, 20)
    batch = [random_tokens(shape, queries, length, torch.float32) for queries, length in ((1, 7), (3, 20))]
    given = place(batch, shape, "heads first")
    with pytest.raises(bad.error, match=f"^{bad.argument}:"):
        paged_attention(**(given | {bad.argument: bad.change(given[bad.argument])}))


@pytest.mark.parametrize("bad", BAD_STORE, ids=str)
def test_store_kv_refuses_bad_input_by_name_before_anything_is_written(bad: Bad) -> None:
    shape = Shape(4, 2, 20)
    cache = make_cache("heads first", 3, shape, torch.float32)
    k, v = torch.randn(2, 5, shape.kv_heads, shape.head_dim)
    given = {"k": k, "v": v, "key_cache": cache.keys, "value_cache": cache.values, "slot_mapping": torch.arange(5)}
    with pytest.raises(bad.error, match=f"^{bad.argument}:"):
        store_kv(**(given | {bad.argument: bad.change(given[bad.argument])}))
    assert cache.keys.isnan().all()
    assert cache.values.isnan().all()


def test_store_kv_refuses_other_heads() -> None:
    cache = make_cache("slots", 3, Shape(4, 2, 20), torch.float32)
    k = torch.randn(5, 1, 20)
    with pytest.raises(ValueError, match=r"^k: expected 2 key-value heads, got 1"):
        store_kv(k, k, *cache, torch.full((5,), -1))
