"""The walk of a prefill from chunk to chunk for Hopper, in Gluon: the tensor cores work while the threads prepare.

What a step computes, and how it rounds, is in :mod:`qnext_kernels.gated_delta_rule.triton_state`. Three of its five
products wait for each other. Each of them is on its way beside another that it does not wait for:

    predicted = S kᵀ and half of S qᵀ │ n = rest Mᵀ and the other half │ S + n k and o + n Pᵀ │ the next chunk …

A state and what is computed from it stay in registers, as first factors. These must be complete before a product begins
while none is on its way, and none may be where the loop closes: else the assembler lets each wait for the one before.
A warp of its own loads the tiles of the next chunks.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qnext_kernels.gated_delta_rule.cpu import RECURRENT_TOKENS
from qnext_kernels.gated_delta_rule.reference import CHUNK_SIZE
from qnext_kernels.gated_delta_rule.triton_state import can_have_tiles, heads_side_by_side
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_support import ceil_div

DIM = 128
"""Of keys and of values."""
BLOCK_V = 64
"""Value dimensions of a program, 16 for each of its warps that multiply."""
STAGES = 3
"""Chunks whose tiles have a place in shared memory."""
REGISTERS = 136
"""Of a thread on average: those that multiply get what the warp that loads gives up, 240."""
HALVES = 1 if triton.__version__.startswith("3.6.") else 2
"""Products with the queries of a chunk. One is 5 % faster with Triton 3.6, but each waits for another with 3.9."""
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
PLAIN = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


@gluon.jit
def load_tiles(  # type: ignore[no-untyped-def]
    tiles, memory, ready, consumed, chunks, token, q_column, k_column, v_column, first_entry,
    HV: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """Load the tiles of one chunk after the other, each into the place that has been free for longest."""
    q_tiles, k_tiles, v_tiles, solve_tiles, attend_tiles, factor_tiles = tiles
    qs, ks, vs, Ms, Ps, vectors = memory
    for c in range(chunks):
        stage = c % STAGES
        mbarrier.wait(consumed.index(stage), ((c // STAGES) & 1) ^ 1)
        bar = ready.index(stage)
        entry = first_entry + c * HV
        mbarrier.expect(bar, BYTES)
        load_tile(k_tiles, [token + c * C, k_column], bar, ks.index(stage))
        load_tile(q_tiles, [token + c * C, q_column], bar, qs.index(stage))
        load_tile(v_tiles, [token + c * C, v_column], bar, vs.index(stage))
        load_tile(factor_tiles, [entry * (3 * C)], bar, vectors.index(stage))
        load_tile(solve_tiles, [entry * C, 0], bar, Ms.index(stage))
        load_tile(attend_tiles, [entry * C, 0], bar, Ps.index(stage))


@gluon.jit
def places(  # type: ignore[no-untyped-def]
    place, D: gl.constexpr, BLOCK_V: gl.constexpr, layout: gl.constexpr
):
    """Pointers to the elements of a block of a state, computed where they are needed: a loop has no registers left."""
    value = gl.arange(0, BLOCK_V, gl.SliceLayout(1, layout))
    value = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], gl.int32, is_pure=False, pack=1)
    key = gl.arange(0, D, gl.SliceLayout(0, layout))
    return place + (value.to(gl.int64)[:, None] * D + key[None, :])


@gluon.jit
def put_outputs(o, stored, C: gl.constexpr, HALVES: gl.constexpr):  # type: ignore[no-untyped-def]
    """Outputs, in parts whose columns are tokens, into a tile of shared memory."""
    PART: gl.constexpr = C // HALVES
    for half in gl.static_range(HALVES):
        stored.slice(half * PART, PART).permute((1, 0)).store(o[half].to(gl.bfloat16))


@gluon.jit
def store_outputs(  # type: ignore[no-untyped-def]
    o, c, outs, consumed, out_tiles, token, out_column,
    C: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Begin to store the outputs of whole chunk ``c``, whose tiles are free then."""
    stored = outs.index(c % 2)
    put_outputs(o, stored, C, HALVES)
    # The store of the chunk before has ended then: the next may write where it read.
    tma.store_wait(0)
    fence_async_shared()
    barrier()
    mbarrier.arrive(consumed.index(c % STAGES), count=1)
    store_tile(out_tiles, [token + c * C, out_column], stored)


@gluon.jit
def begin(  # type: ignore[no-untyped-def]
    S, before, o, c, count, memory, outs, ready, consumed, out_tiles, decays, token, out_column, entry,
    C: gl.constexpr, D: gl.constexpr, BLOCK_V: gl.constexpr, STAGES: gl.constexpr,
    HALVES: gl.constexpr, FIRST: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """The products with the state before chunk ``c``, of ``count`` tokens, and n; meanwhile store earlier outputs.

    Args:
        S: [BLOCK_V, D] float32, the state before it; before: the same, a first factor.
        o: the outputs of the chunk before in parts, stored here unless FIRST.
        entry: of the chunk and value head.

    Returns:
        The decayed state; nᵀ; nᵀ with its factors in the state; and what the state adds to the outputs, in parts.
    """
    PART: gl.constexpr = C // HALVES
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BLOCK_V // 16, 1], [16, C, 16])
    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BLOCK_V // 16, 1], [16, PART, 16])
    of_state: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    of_part: gl.constexpr = gl.DotOperandLayout(0, part, 2)
    columns: gl.constexpr = gl.SliceLayout(0, narrow)
    part_columns: gl.constexpr = gl.SliceLayout(0, part)

    qs, ks, vs, Ms, _, vectors = memory
    stage = c % STAGES
    factors, k_tile, q_tile = vectors.index(stage), ks.index(stage), qs.index(stage)
    empty = gl.zeros([BLOCK_V, C], gl.float32, narrow)
    nothing = gl.zeros([BLOCK_V, PART], gl.float32, part)
    queried = gl.convert_layout(before, of_part)
    mbarrier.wait(ready.index(stage), (c // STAGES) & 1)
    if PARTIAL:
        # What lies behind the sequence may be no number.
        loads: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [BLOCK_V // 16, 1], [1, 0])
        valid = gl.arange(0, C, gl.SliceLayout(1, loads)) < count
        k_tile.store(gl.where(valid[:, None], k_tile.load(loads), 0.0))
        fence_async_shared()
        barrier()
    predicted = warpgroup_mma(before, k_tile.permute((1, 0)), empty, use_acc=False, is_async=True)
    o_1 = warpgroup_mma(queried, q_tile.slice(0, PART).permute((1, 0)), nothing, use_acc=False, is_async=True)
    decay = gl.load(decays + entry)
    if not FIRST:
        store_outputs(o, c - 1, outs, consumed, out_tiles, token, out_column, C, STAGES, HALVES)
    from_start = factors.slice(0, C).load(columns)
    vt = vs.index(stage).permute((1, 0)).load(narrow).to(gl.float32)
    predicted = warpgroup_mma_wait(1, deps=[predicted])
    rest = vt - predicted * from_start[None, :]
    if PARTIAL:
        rest = gl.where(gl.arange(0, C, columns)[None, :] < count, rest, 0.0)
    rest = gl.convert_layout(rest.to(gl.bfloat16), of_state)
    to_end = factors.slice(2 * C, C).load(columns)
    o_1 = warpgroup_mma_wait(0, deps=[o_1])

    new = warpgroup_mma(rest, Ms.index(stage).permute((1, 0)), empty, use_acc=False, is_async=True)
    if HALVES == 2:
        o_2 = warpgroup_mma(queried, q_tile.slice(PART, PART).permute((1, 0)), nothing, use_acc=False, is_async=True)
    S = S * decay
    o_1 = o_1 * factors.slice(C, PART).load(part_columns)[None, :]
    new = warpgroup_mma_wait(HALVES - 1, deps=[new])
    update = new * to_end[None, :]
    if HALVES == 2:
        o_2 = warpgroup_mma_wait(0, deps=[o_2])
        o = o_1, o_2 * factors.slice(C + PART, PART).load(part_columns)[None, :]
    else:
        o = (o_1,)
    return S, new, update, o


@gluon.jit
def finish(  # type: ignore[no-untyped-def]
    S, new, update, o, c, memory,
    C: gl.constexpr, D: gl.constexpr, BLOCK_V: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """What n adds to chunk ``c``; return the state behind it, the same as a first factor, and the outputs."""
    PART: gl.constexpr = C // HALVES
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BLOCK_V // 16, 1], [16, D, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BLOCK_V // 16, 1], [16, C, 16])
    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BLOCK_V // 16, 1], [16, PART, 16])
    k_tile, P_tile = memory[1].index(c % STAGES), memory[4].index(c % STAGES)
    update = gl.convert_layout(update.to(gl.bfloat16), gl.DotOperandLayout(0, wide, 2))
    attended = gl.convert_layout(new.to(gl.bfloat16), gl.DotOperandLayout(0, part, 2))
    S = warpgroup_mma(update, k_tile, S, is_async=True)
    o_1 = warpgroup_mma(attended, P_tile.slice(0, PART).permute((1, 0)), o[0], is_async=True)
    if HALVES == 2:
        o_2 = warpgroup_mma(attended, P_tile.slice(PART, PART).permute((1, 0)), o[1], is_async=True)
    S = warpgroup_mma_wait(HALVES, deps=[S])
    before = gl.convert_layout(S.to(gl.bfloat16), gl.DotOperandLayout(0, narrow, 2))
    o = warpgroup_mma_wait(0, deps=[o_1, o_2]) if HALVES == 2 else (warpgroup_mma_wait(0, deps=[o_1]),)
    return S, before, o


@gluon.jit
def walk(  # type: ignore[no-untyped-def]
    out, initial, place, snapshot_place, known, decays, memory, outs, ready, consumed, out_tiles,
    token, out_column, first_entry, whole, tail, pause, ends, ends_with_snapshot,
    HV: gl.constexpr, C: gl.constexpr, D: gl.constexpr, BLOCK_V: gl.constexpr, STAGES: gl.constexpr,
    HALVES: gl.constexpr,
):  # fmt: skip
    """Write the outputs of ``whole`` chunks and of ``tail`` tokens, the state behind them and a snapshot."""
    PART: gl.constexpr = C // HALVES
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BLOCK_V // 16, 1], [16, D, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BLOCK_V // 16, 1], [16, C, 16])
    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BLOCK_V // 16, 1], [16, PART, 16])
    of_state: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    S = gl.load(places(initial, D, BLOCK_V, wide), mask=known, other=0.0)
    nothing = gl.zeros([BLOCK_V, PART], gl.float32, part)
    o = (nothing, nothing) if HALVES == 2 else (nothing,)
    first = 0
    behind = gl.where(pause >= 0, pause, whole)
    for piece in range(2):
        if first < behind:
            before = gl.convert_layout(S.to(gl.bfloat16), of_state)
            S, new, update, o = begin(
                S, before, o, first, C, memory, outs, ready, consumed, out_tiles, decays, token, out_column,
                first_entry + first * HV, C, D, BLOCK_V, STAGES, HALVES, True, False,
            )  # fmt: skip
            for c in range(first + 1, behind):
                S, before, o = finish(S, new, update, o, c - 1, memory, C, D, BLOCK_V, STAGES, HALVES)
                S, new, update, o = begin(
                    S, before, o, c, C, memory, outs, ready, consumed, out_tiles, decays, token, out_column,
                    first_entry + c * HV, C, D, BLOCK_V, STAGES, HALVES, False, False,
                )  # fmt: skip
            S, before, o = finish(S, new, update, o, behind - 1, memory, C, D, BLOCK_V, STAGES, HALVES)
            store_outputs(o, behind - 1, outs, consumed, out_tiles, token, out_column, C, STAGES, HALVES)
        if (piece == 0) & (pause >= 0):
            gl.store(places(snapshot_place, D, BLOCK_V, wide), S)
        first = behind
        behind = whole
    if tail > 0:
        before = gl.convert_layout(S.to(gl.bfloat16), of_state)
        S, new, update, o = begin(
            S, before, o, whole, tail, memory, outs, ready, consumed, out_tiles, decays, token, out_column,
            first_entry + whole * HV, C, D, BLOCK_V, STAGES, HALVES, True, True,
        )  # fmt: skip
        S, before, o = finish(S, new, update, o, whole, memory, C, D, BLOCK_V, STAGES, HALVES)
        stored = outs.index(whole % 2)
        put_outputs(o, stored, C, HALVES)
        barrier()
        tile: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_V, BLOCK_V // 8], [BLOCK_V // 16, 1], [1, 0])
        row = gl.arange(0, C, gl.SliceLayout(1, tile))
        column = gl.arange(0, BLOCK_V, gl.SliceLayout(0, tile))
        outputs = (token + whole * C).to(gl.int64) * (HV * D) + out_column + row[:, None] * (HV * D) + column[None, :]
        gl.store(out + outputs, stored.load(tile), mask=row[:, None] < tail)
    if ends_with_snapshot:
        gl.store(places(snapshot_place, D, BLOCK_V, wide), S)
    if ends:
        gl.store(places(place, D, BLOCK_V, wide), S)
    tma.store_wait(0)


@gluon.jit
def sequence_of_segment(segment, query_start_loc, sequences, TOKENS: gl.constexpr):  # type: ignore[no-untyped-def]
    """The last sequence n whose first segment, number ⌊start_n / TOKENS⌋ + n, is not behind ``segment``."""
    low = segment * 0
    high = low + sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        begins = gl.load(query_start_loc + middle).to(gl.int32) // TOKENS + middle <= segment
        low = gl.where(begins, middle, low)
        high = gl.where(begins, high, middle - 1)
    return low


@gluon.jit(do_not_specialize=["sequences", "with_snapshots"])
def gluon_walk_kernel(  # type: ignore[no-untyped-def]
    out, state, starts, slots, query_start_loc, has_initial, snapshot_slots, snapshot_lengths, decays,
    q_tiles, k_tiles, v_tiles, out_tiles, solve_tiles, attend_tiles, factor_tiles,
    state_slot, sequences, with_snapshots,
    q_head: gl.constexpr, k_head: gl.constexpr, v_head: gl.constexpr,
    H: gl.constexpr, HV: gl.constexpr, C: gl.constexpr, D: gl.constexpr, BLOCK_V: gl.constexpr, SHORT: gl.constexpr,
    STAGES: gl.constexpr, HALVES: gl.constexpr, SEGMENT: gl.constexpr,
):  # fmt: skip
    """Outputs and states of BLOCK_V of the value dimensions of one value head of one sequence, chunk after chunk.

    Grid: N · HV · D / BLOCK_V, the blocks of one head next to each other. Bytes and operations of a chunk: those of
    ``state_kernel``.

    Args:
        out, state, …, decays: as of ``state_kernel``, with K = V = D and float32 states.
        q_tiles, …, factor_tiles: descriptors of q, k, v and out, the heads of a token a row, of solve and attend, and
            of the factors in one dimension, in tiles of 4 C of which C belong to the next.
        starts: of ``start_kernel``; SEGMENT: chunks of a segment, or 0: not read, a program walks through a sequence.
        HALVES: in how many parts the products with q are computed, 1 or 2.
    """
    BLOCKS: gl.constexpr = D // BLOCK_V
    tile: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_V, BLOCK_V // 8], [BLOCK_V // 16, 1], [1, 0])
    dtype: gl.constexpr = gl.bfloat16
    BYTES: gl.constexpr = 2 * C * (2 * D + BLOCK_V + 2 * C) + 16 * C

    program = gl.program_id(0)
    head = (program // BLOCKS) % HV
    part = program // (BLOCKS * HV)
    n = part
    if SEGMENT:
        n = sequence_of_segment(part, query_start_loc, sequences, SEGMENT * C)
    first_value = (program % BLOCKS) * BLOCK_V
    start = gl.load(query_start_loc + n).to(gl.int64)
    length = (gl.load(query_start_loc + n + 1).to(gl.int64) - start).to(gl.int32)
    length -= gl.where(length % C <= SHORT, length % C, 0)
    first_entry = (start // C + n).to(gl.int32) * HV + head
    slot = gl.load(slots + n).to(gl.int64)
    live = slot >= 0
    has_snapshot = live & (with_snapshots != 0)
    snapshot = gl.load(snapshot_slots + n, mask=has_snapshot, other=-1).to(gl.int64)
    has_snapshot = has_snapshot & (snapshot >= 0)
    snapshot_at = gl.load(snapshot_lengths + n, mask=has_snapshot, other=-1).to(gl.int32)
    known = live & (gl.load(has_initial + n) != 0) & ((length > 0) | has_snapshot)
    between = (snapshot_at >= 0) & (snapshot_at % C == 0) & (snapshot_at <= length // C * C)
    ends = length > 0
    ends_with_snapshot = length == snapshot_at
    block = state + (head * D + first_value) * D
    initial = block + slot * state_slot
    if SEGMENT:
        # From here on a sequence is what the segment has of it: its last segment, which may be empty, has the rest.
        segments = (gl.load(query_start_loc + n + 1).to(gl.int64) - start).to(gl.int32) // (SEGMENT * C)
        number = part - ((start // (SEGMENT * C)).to(gl.int32) + n)
        last = number >= segments
        skipped = number * (SEGMENT * C)
        live = live & (number <= segments)
        known = live
        start += skipped
        length = gl.where(last, length - skipped, SEGMENT * C)
        length = gl.where(number <= segments, length, 0)
        first_entry += number * (SEGMENT * HV)
        snapshot_at -= skipped
        between = between & (snapshot_at >= 0) & (snapshot_at < SEGMENT * C)
        ends = ends & last
        ends_with_snapshot = ends_with_snapshot & last
        initial = starts + ((part.to(gl.int64) * HV + head) * D + first_value) * D
    token = start.to(gl.int32)
    if not live:
        row = gl.arange(0, C, gl.SliceLayout(1, tile))
        column = gl.arange(0, BLOCK_V, gl.SliceLayout(0, tile))
        nothing = gl.zeros([C, BLOCK_V], dtype, tile)
        for c in range((length + C - 1) // C):
            at = (start + c * C) * (HV * D) + head * D + first_value + row[:, None] * (HV * D) + column[None, :]
            gl.store(out + at, nothing, mask=row[:, None] < length - c * C)

    whole = gl.where(live, length // C, 0)
    tail = gl.where(live, length % C, 0)
    chunks = whole + gl.where(tail > 0, 1, 0)
    pause = gl.where(live & between, snapshot_at // C, -1)

    qs = gl.allocate_shared_memory(dtype, [STAGES, C, D], SWIZZLED)
    ks = gl.allocate_shared_memory(dtype, [STAGES, C, D], SWIZZLED)
    vs = gl.allocate_shared_memory(dtype, [STAGES, C, BLOCK_V], SWIZZLED)
    Ms = gl.allocate_shared_memory(dtype, [STAGES, C, C], SWIZZLED)
    Ps = gl.allocate_shared_memory(dtype, [STAGES, C, C], SWIZZLED)
    vectors = gl.allocate_shared_memory(gl.float32, [STAGES, 4 * C], PLAIN)
    outs = gl.allocate_shared_memory(dtype, [2, C, BLOCK_V], SWIZZLED)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    consumed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(consumed.index(s), count=1)
    fence_async_shared()
    barrier()

    key_head = head // (HV // H)
    memory = (qs, ks, vs, Ms, Ps, vectors)
    tiles = (q_tiles, k_tiles, v_tiles, solve_tiles, attend_tiles, factor_tiles)
    gl.warp_specialize(
        [
            (walk, (
                out, initial, block + slot * state_slot, block + snapshot * state_slot, known, decays,
                memory, outs, ready, consumed, out_tiles, token, head * D + first_value, first_entry,
                whole, tail, pause, live & ends, live & ends_with_snapshot, HV, C, D, BLOCK_V, STAGES, HALVES,
            )),
            (load_tiles, (
                tiles, memory, ready, consumed, chunks, token, key_head * q_head, key_head * k_head,
                head * v_head + first_value, first_entry, HV, C, STAGES, BYTES,
            )),
        ],
        [1], [24],
    )  # fmt: skip


def serves(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> bool:
    """Whether the kernel here can walk through this prefill."""
    fits = q.shape[2] == v.shape[2] == DIM and v.dtype == torch.bfloat16 and state.dtype == torch.float32
    return fits and can_have_tiles(q, k, v)


def run_gluon_walk(
    tokens: tuple[Tensor, ...],
    out: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    has_initial: Tensor,
    snapshots: tuple[Tensor, Tensor] | None,
    chunks: tuple[Tensor, ...],
    starts: Tensor | None = None,
    segment: int = 0,
) -> None:
    """Launch :func:`gluon_walk_kernel` behind the kernel of the chunks; arguments as of ``run_chunked``.

    Args:
        chunks: of ``solve_chunks``.
        starts, segment: the states before segments of so many chunks, if these run beside each other.
    """
    q, k, v, *_ = tokens
    solve, attend, factors, decays = chunks
    value_heads = v.shape[1]
    sequences = slots.shape[0]
    snapshot_slots, snapshot_lengths = snapshots if snapshots is not None else (slots, slots)
    tiles = []
    for x, columns in ((q, DIM), (k, DIM), (v, BLOCK_V), (out, BLOCK_V)):
        tiles.append(TensorDescriptor(x, *heads_side_by_side(x), [CHUNK_SIZE, columns], SWIZZLED))
    for x in (solve, attend):
        tiles.append(TensorDescriptor(x, [*x.shape], [CHUNK_SIZE, 1], [CHUNK_SIZE, CHUNK_SIZE], SWIZZLED))
    tiles.append(TensorDescriptor(factors, [factors.numel()], [1], [4 * CHUNK_SIZE], PLAIN))
    parts = sequences + (q.shape[0] // (segment * CHUNK_SIZE) if segment else 0)
    launch(
        gluon_walk_kernel, (parts * value_heads * ceil_div(DIM, BLOCK_V),),
        out, state, state if starts is None else starts, slots, query_start_loc, has_initial,
        snapshot_slots, snapshot_lengths, decays, *tiles,
        state.stride(0), sequences, int(snapshots is not None),
        q_head=q.stride(1), k_head=k.stride(1), v_head=v.stride(1),
        H=q.shape[1], HV=value_heads, C=CHUNK_SIZE, D=DIM, BLOCK_V=BLOCK_V, SHORT=RECURRENT_TOKENS, STAGES=STAGES,
        HALVES=HALVES, SEGMENT=segment, num_warps=BLOCK_V // 16, maxnreg=REGISTERS,
    )  # fmt: skip
