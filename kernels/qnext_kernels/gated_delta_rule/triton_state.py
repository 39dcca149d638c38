"""The walk of a prefill from chunk to chunk, the second launch of two: outputs and states.

What a chunk does is in :mod:`qnext_kernels.gated_delta_rule.triton_chunked`. One program walks through a sequence with
some rows of the state of a value head, which stay in registers. A step waits for the one before it, and in it one
product for another: what counts is how long that takes, not how many operations it is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qnext_kernels.dispatch import switched_on
from qnext_kernels.gated_delta_rule.cpu import RECURRENT_TOKENS
from qnext_kernels.gated_delta_rule.reference import CHUNK_SIZE
from qnext_kernels.gated_delta_rule.triton_chunked import Configuration, product, solve_chunks
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_support import ALIGNMENT, ceil_div, current_target, interpreting

NO_TILES = (None,) * 5
GLUON_OF = ("3.6", "3.7", "3.8", "3.9")
"""Versions of Triton that have compiled the walk in Gluon, which is experimental and may change in any other."""
_gluon_allowed = switched_on("QNEXT_GLUON", default=True)


@triton.jit
def rows_at(place, token: tl.constexpr, columns, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointers to the ``columns`` of C rows that lie ``token`` elements apart.

    The rows of a thread lie 8 or more apart: said like this, their addresses are one and constants, not registers each.
    """
    row = tl.arange(0, C)
    eights = (row // 8).to(tl.int64)[:, None] * (8 * token)
    return place + (eights + ((row % 8) * token)[:, None] + columns[None, :])


@triton.jit
def load_rows(  # type: ignore[no-untyped-def]
    place, token: tl.constexpr, first_column, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, count, C: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """[C, BLOCK] of rows of COLUMNS, from ``first_column`` on; zeros behind them and, if PARTIAL, behind ``count``."""
    columns = first_column + tl.arange(0, BLOCK)
    rows = rows_at(place, token, columns, C)
    if PARTIAL or COLUMNS % BLOCK != 0:
        inside = (tl.arange(0, C)[:, None] < count) & (columns[None, :] < COLUMNS)
        return tl.load(rows, mask=inside, other=0.0)
    return tl.load(rows)


@triton.jit
def store_rows(  # type: ignore[no-untyped-def]
    place, token: tl.constexpr, tile, first_column, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, count, C: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """Store tile [BLOCK, C], a column a row of COLUMNS, from ``first_column`` on, where PARTIAL only ``count`` rows."""
    # 16 columns of 16 rows at a time: a warp that holds 16 rows of the tile then stores what it holds.
    tile = tl.permute(tl.reshape(tile, [BLOCK // 16, 16, C // 16, 16]), [2, 0, 3, 1])
    rows = tl.arange(0, C // 16)[:, None, None, None] * 16 + tl.arange(0, 16)[None, None, :, None]
    columns = tl.arange(0, BLOCK // 16)[None, :, None, None] * 16 + tl.arange(0, 16)[None, None, None, :]
    columns += first_column
    if PARTIAL or COLUMNS % BLOCK != 0:
        tl.store(place + rows * token + columns, tile, mask=(rows < count) & (columns < COLUMNS))
    else:
        tl.store(place + rows * token + columns, tile)


@triton.jit
def sum_of_products(a, b, accumulated, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``accumulated`` + a b in float32."""
    if PRECISION == "tf32x3":
        return accumulated + product(a, b, PRECISION)
    return tl.dot(a, b, accumulated, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def walk_chunk(  # type: ignore[no-untyped-def]
    S, decay, q, k, v, out, solve, attend, factors, tiles_q, tiles_k, tiles_v, tiles_solve, tiles_attend,
    first, count, left, entry, head, first_value,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr, v_token: tl.constexpr,
    v_head: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, POOL: tl.constexpr, TILES: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """Write the outputs of the chunk that begins with token ``first``; return the state behind it.

    Everything is transposed, so that the state and what is computed from it are first factors: tensor cores of Hopper
    take these from registers, and second factors from shared memory, where a loop has its loads put ahead of time.

    Args:
        S: [BLOCK_V, BLOCK_K] float32, the rows from ``first_value`` on of the state before it, rounded to POOL here.
        decay: exp(G_C) of the chunk.
        tiles_q, …, tiles_attend: of :func:`state_kernel`, where TILES: never for a chunk that is PARTIAL.
        count: the tokens of the chunk, C unless PARTIAL; left: not 0.
        entry: of the chunk and value head in solve, attend and factors; others as in :func:`state_kernel`.
    """
    index = tl.arange(0, C)
    key_head = head // (HV // H)
    dtype = solve.dtype.element_ty
    token, row = first.to(tl.int32), entry * C
    entry = entry.to(tl.int64)
    # Everything is loaded where it is needed, so that it takes no registers before.
    vector = factors + entry * 3 * C
    if TILES:
        ks = tiles_k.load([token, key_head * k_head])
        vs = tiles_v.load([token, head * v_head + first_value])
    else:
        ks = load_rows(k + first * k_token + key_head * k_head, k_token, 0, K, BLOCK_K, count, C, PARTIAL).to(dtype)
        vs = load_rows(v + first * v_token + head * v_head, v_token, first_value, V, BLOCK_V, count, C, PARTIAL)
    vt = tl.trans(vs).to(tl.float32)
    S = S.to(POOL).to(tl.float32)
    before = S.to(dtype)
    predicted = product(before, tl.trans(ks), PRECISION)
    if PRECISION == "tf32x3":
        # A factor is two there. Those of the state take half of the registers: both of its products come first.
        qs = load_rows(q + first * q_token + key_head * q_head, q_token, 0, K, BLOCK_K, count, C, PARTIAL).to(dtype)
        o = product(before, tl.trans(qs), PRECISION)
    rest = (vt - predicted * tl.load(vector + index)[None, :]).to(dtype)
    M = tiles_solve.load([row, 0]) if TILES else tl.load(rows_at(solve + entry * C * C, C, index, C))
    new = product(rest, tl.trans(M), PRECISION)
    # No product's factor follows from these, so that no loop loads them ahead; nor does it move what is in a branch.
    of_queries = tl.zeros([C], tl.float32)
    if PRECISION == "tf32x3":
        # Those of the keys would take the other half until the next product with them, which has them loaded anew: in
        # the branch, of which a compiler must not know that a tail takes it.
        ks, left = tl.zeros([C, BLOCK_K], dtype), row + 1
    if left > 0:
        of_queries = tl.load(vector + C + index)
        if PRECISION == "tf32x3":
            ks = load_rows(k + first * k_token + key_head * k_head, k_token, 0, K, BLOCK_K, count, C, PARTIAL).to(dtype)
    S = sum_of_products((new * tl.load(vector + 2 * C + index)[None, :]).to(dtype), ks, S * decay, PRECISION)
    if TILES:
        qs = tiles_q.load([token, key_head * q_head])
        P = tiles_attend.load([row, 0])
    else:
        if PRECISION != "tf32x3":
            qs = load_rows(q + first * q_token + key_head * q_head, q_token, 0, K, BLOCK_K, count, C, PARTIAL).to(dtype)
        P = tl.load(rows_at(attend + entry * C * C, C, index, C))
    if PRECISION != "tf32x3":
        o = product(before, tl.trans(qs), PRECISION)
    o = o * of_queries[None, :]
    o = sum_of_products(new.to(dtype), tl.trans(P), o, PRECISION).to(out.dtype.element_ty)
    store_rows(out + first * (HV * V) + head * V, HV * V, o, first_value, V, BLOCK_V, count, C, PARTIAL)
    return S


@triton.jit
def walk(  # type: ignore[no-untyped-def]
    S, q, k, v, out, solve, attend, factors, decays, tiles_q, tiles_k, tiles_v, tiles_solve, tiles_attend,
    start, first_chunk, behind, tail, pause, place, first_entry, head, first_value,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr, v_token: tl.constexpr,
    v_head: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, POOL: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write the outputs of whole chunks and of the ``tail`` tokens behind them; return the state there.

    Args:
        start: the sequence's first token; first_entry: of its first chunk and the value head.
        first_chunk, behind: its whole chunks from one to before the other.
        pause: the chunk in front of which the state is stored at ``place`` [V, K] in a pool, -1 for none.
        others: as in :func:`walk_chunk`.
    """
    keys = tl.arange(0, BLOCK_K)
    inside = (first_value + tl.arange(0, BLOCK_V)[:, None] < V) & (keys[None, :] < K)
    next_chunk = first_chunk
    until = tl.where(pause >= 0, pause, first_chunk)
    for part in range(2):
        decay = tl.load(decays + first_entry + next_chunk * HV, mask=next_chunk < until, other=0.0)
        for c in range(next_chunk, until):
            entry = first_entry + c * HV
            next_decay = tl.load(decays + entry + HV, mask=c + 1 < until, other=0.0)
            S = walk_chunk(
                S, decay, q, k, v, out, solve, attend, factors, tiles_q, tiles_k, tiles_v, tiles_solve, tiles_attend,
                start + c * C, C, until - c, entry, head, first_value,
                q_token, q_head, k_token, k_head, v_token, v_head, H, HV, K, V, BLOCK_K, BLOCK_V, C, PRECISION, POOL,
                TILES, False,
            )  # fmt: skip
            decay = next_decay
        if (part == 0) & (pause >= 0):
            tl.store(rows_at(place, K, keys, BLOCK_V), S.to(place.dtype.element_ty), mask=inside)
        next_chunk = until
        until = behind
    if tail > 0:
        entry = first_entry + behind * HV
        decay = tl.load(decays + entry)
        S = walk_chunk(
            S, decay, q, k, v, out, solve, attend, factors, tiles_q, tiles_k, tiles_v, tiles_solve, tiles_attend,
            start + behind * C, tail, tail, entry, head, first_value,
            q_token, q_head, k_token, k_head, v_token, v_head, H, HV, K, V, BLOCK_K, BLOCK_V, C, PRECISION, POOL,
            False, True,
        )  # fmt: skip
    return S


@triton.jit
def store_zeros(  # type: ignore[no-untyped-def]
    out, start, first_chunk, behind, length, head, first_value, HV: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Outputs of chunks of a sequence that is skipped, which has ``length`` tokens."""
    nothing = tl.zeros([BLOCK_V, C], out.dtype.element_ty)
    for c in range(first_chunk, behind):
        place = out + (start + c * C) * (HV * V) + head * V
        store_rows(place, HV * V, nothing, first_value, V, BLOCK_V, length - c * C, C, True)


@triton.jit(do_not_specialize=["with_snapshots"])
def state_kernel(  # type: ignore[no-untyped-def]
    q, k, v, out, state, slots, query_start_loc, has_initial, snapshot_slots, snapshot_lengths,
    solve, attend, factors, decays, tiles_q, tiles_k, tiles_v, tiles_solve, tiles_attend, state_slot, with_snapshots,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr, v_token: tl.constexpr,
    v_head: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, C: tl.constexpr, SHORT: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Outputs and states of BLOCK_V of the value dimensions of one value head of one sequence, chunk after chunk.

    The block of the state stays in registers. It is rounded to the dtype of the pool behind every chunk, as it is where
    a prefill is split there.

    Grid: N · HV · ceil(V / BLOCK_V), the blocks of one head next to each other, which share q, k, M and P.

    Bytes of a chunk and block, in 16 bits: 256 K + 16 KiB for q, k, M and P, mostly from the L2 cache, and 256 BLOCK_V
    for v and out. Operations: 128 BLOCK_V (3 K + 192).

    Args:
        q, k: [T, H, K]; v: [T, HV, V]; out: contiguous [T, HV, V]. Their strides are constants of the kernel: addresses
            that a loop computes are as many instructions as its products take cycles.
        state: [slots, HV, V, K], read where ``has_initial``, written; a slot is ``state_slot`` elements from the next.
        slots, has_initial: [N]; query_start_loc: [N + 1]; snapshot_slots, snapshot_lengths: [N], not read where
            ``with_snapshots`` is 0.
        solve, attend, factors, decays: of :func:`chunk_kernel`.
        tiles_q, …, tiles_attend: where TILES, tensor descriptors of q, k and v, the heads of a token a row, with tiles
            [C, K], [C, K] and [C, BLOCK_V], and of solve and attend, rows of C, with tiles [C, C].
    """
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    head = (program // BLOCKS) % HV
    n = program // (BLOCKS * HV)
    keys = tl.arange(0, BLOCK_K)
    first_value = (program % BLOCKS) * BLOCK_V
    start = tl.load(query_start_loc + n).to(tl.int64)
    end = tl.load(query_start_loc + n + 1).to(tl.int64)
    length = (end - start).to(tl.int32)
    length -= tl.where(length % C <= SHORT, length % C, 0)
    first_entry = (start // C + n).to(tl.int32) * HV + head

    slot = tl.load(slots + n).to(tl.int64)
    live = slot >= 0
    inside = (first_value + tl.arange(0, BLOCK_V)[:, None] < V) & (keys[None, :] < K)
    tile = state + (head * V + first_value) * K
    has_snapshot = live & (with_snapshots != 0)
    snapshot = tl.load(snapshot_slots + n, mask=has_snapshot, other=-1).to(tl.int64)
    has_snapshot = has_snapshot & (snapshot >= 0)
    snapshot_at = tl.load(snapshot_lengths + n, mask=has_snapshot, other=-1).to(tl.int32)
    known = live & (tl.load(has_initial + n) != 0) & ((length > 0) | has_snapshot)
    S = tl.load(rows_at(tile + slot * state_slot, K, keys, BLOCK_V), mask=inside & known, other=0.0).to(tl.float32)

    whole = tl.where(live, length // C, 0)
    tail = tl.where(live, length % C, 0)
    between = (snapshot_at >= 0) & (snapshot_at % C == 0) & (snapshot_at <= whole * C)
    place = tile + snapshot * state_slot
    S = walk(
        S, q, k, v, out, solve, attend, factors, decays, tiles_q, tiles_k, tiles_v, tiles_solve, tiles_attend,
        start, 0, whole, tail, tl.where(between, snapshot_at // C, -1), place,
        first_entry, head, first_value, q_token, q_head, k_token, k_head, v_token, v_head,
        H, HV, K, V, BLOCK_K, BLOCK_V, C, PRECISION, state.dtype.element_ty, TILES,
    )  # fmt: skip
    last = S.to(state.dtype.element_ty)
    if length == snapshot_at:
        tl.store(rows_at(place, K, keys, BLOCK_V), last, mask=inside)
    if live & (length > 0):
        tl.store(rows_at(tile + slot * state_slot, K, keys, BLOCK_V), last, mask=inside)
    skipped = tl.where(live, 0, (length + C - 1) // C)
    store_zeros(out, start, 0, skipped, length, head, first_value, HV, V, BLOCK_V, C)


def heads_side_by_side(x: Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides of x [T, H, D] as a matrix whose rows are tokens."""
    (tokens, heads, dim), (token, head, _) = x.shape, x.stride()
    return [tokens, (heads - 1) * head + dim], [token, 1]


def can_have_tiles(*tensors: Tensor) -> bool:
    """Whether tensors [T, H, D] can be described for loading tiles of a whole chunk."""
    return all(len(x) >= CHUNK_SIZE and x.stride(0) * x.itemsize % ALIGNMENT == 0 for x in tensors)


def tiles_of(q: Tensor, k: Tensor, v: Tensor, chunks: tuple[Tensor, ...], config: Configuration) -> tuple[Any, ...]:
    """Tensor descriptors of q, k, v, solve and attend, in tiles of a whole chunk; None where they cannot have any."""
    if not config.tiles or not can_have_tiles(q, k, v):
        return NO_TILES
    found = []
    for x, columns in ((q, config.block_k), (k, config.block_k), (v, config.block_v)):
        found.append(TensorDescriptor(x, *heads_side_by_side(x), [CHUNK_SIZE, columns]))
    for x in chunks[:2]:
        found.append(TensorDescriptor(x, [*x.shape], [CHUNK_SIZE, 1], [CHUNK_SIZE, CHUNK_SIZE]))
    return tuple(found)


def gluon_walk_for(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Any:
    """The module of the walk in Gluon if that can walk through this prefill, with the same bits; else None."""
    module = _gluon_walk() if _gluon_allowed and current_target().wgmma and not interpreting() else None
    return module if module is not None and module.serves(q, k, v, state) else None


@cache
def _gluon_walk() -> Any:
    """None with a version of Triton that has not compiled it."""
    if ".".join(triton.__version__.split(".")[:2]) not in GLUON_OF:
        return None
    from qnext_kernels.gated_delta_rule import gluon_walk

    return gluon_walk


def run_chunked(
    tokens: tuple[Tensor, ...],
    out: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    has_initial: Tensor,
    snapshots: tuple[Tensor, Tensor] | None,
) -> None:
    """Launch :func:`chunk_kernel` and :func:`state_kernel`.

    Args:
        tokens: q, k, v (aligned rows of unit stride), a, b (rows of unit stride), A_log and dt_bias (contiguous).
        out: [T, HV, V], written, except where a sequence ends in a chunk of at most RECURRENT_TOKENS.
        state, slots, query_start_loc, has_initial, snapshots: of the public function, all but ``state`` contiguous.
    """
    q, k, v, *_ = tokens
    value_heads, value_dim = v.shape[1:]
    sequences = slots.shape[0]
    if sequences == 0:
        return
    config = Configuration(q.shape[2], value_dim, v.dtype, current_target())
    chunks, shapes = solve_chunks(tokens, slots, query_start_loc, config)
    gluon_walk = gluon_walk_for(q, k, v, state)
    if gluon_walk is not None:
        gluon_walk.run_gluon_walk(tokens, out, state, slots, query_start_loc, has_initial, snapshots, chunks)
        return
    snapshot_slots, snapshot_lengths = snapshots if snapshots is not None else (slots, slots)
    tiles = tiles_of(q, k, v, chunks, config)
    launch(
        state_kernel, (sequences * value_heads * ceil_div(value_dim, config.block_v),),
        q, k, v, out, state, slots, query_start_loc, has_initial, snapshot_slots, snapshot_lengths, *chunks, *tiles,
        state.stride(0), int(snapshots is not None), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        V=value_dim, BLOCK_V=config.block_v, SHORT=RECURRENT_TOKENS, TILES=tiles[0] is not None,
        num_warps=config.state_warps, num_stages=config.stages, **shapes,
    )  # fmt: skip
