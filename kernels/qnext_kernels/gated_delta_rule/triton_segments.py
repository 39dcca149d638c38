"""A prefill's sequences in segments of 8 chunks that run beside each other: context parallelism on one GPU.

A chunk maps the state before it to the state behind it, and what it does is linear in the state (the chunked form in
:mod:`qnext_kernels.gated_delta_rule.triton_chunked`); so does a segment. With Γ the product of its decays:

    S ← Γ S + S Zᵀ + B                 Z [K, K], B [V, K]

B is the state that a walk over the segment leaves which starts from zero. Z is one as well, of K columns in place of V:
instead of the values v_i it has what is left of the initial state's keys, −exp(G_i) Γ' k̂_i, where Γ' are the decays
before the chunk. Γ S, which is what a head remembers, is never rounded to the dtype of the products; Z and S are, once
for a segment. Three launches follow the one for chunks:

    transition_kernel   Z, B and Γ of every segment at once
    start_kernel        the states before the segments, one after the other: a product of K × K each
    segment_kernel      the walk through every segment at once, from its state and with its outputs

A walk waits for one product after the other, so that what counts is how many chunks (of ``start_kernel``: segments) are
behind each other on a GPU with 132 multiprocessors, each of which holds two programs of the first kernel or one of the
last. The serial walk has two programs a sequence and value head. For a chunk and head with K = V = 128, four programs
of the first kernel and two of the last do 2.25 times its operations.

Segments lie at fixed places behind the start of a sequence, whatever the batch, and the state in front of each is
rounded to the dtype of the pool. So a prefill split there has the bits of the unsplit one, a snapshot those of a
prefill of its tokens alone, and a sequence's bits do not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.gated_delta_rule.cpu import RECURRENT_TOKENS
from qnext_kernels.gated_delta_rule.reference import CHUNK_SIZE
from qnext_kernels.gated_delta_rule.triton_chunked import Configuration, product, sequence_of_chunk, solve_chunks
from qnext_kernels.gated_delta_rule.triton_state import (
    gluon_walk_for,
    rows_at,
    store_zeros,
    sum_of_products,
    tiles_of,
    walk,
)
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_support import Target, ceil_div, current_target, power_of_two

SEGMENT = 8
"""Chunks of a segment: with fewer there are more steps in ``start_kernel``, with more fewer programs."""


@triton.jit(do_not_specialize=["sequences"])
def transition_kernel(  # type: ignore[no-untyped-def]
    k, v, slots, query_start_loc, solve, factors, decays, transitions, additions, spans,
    k_token, k_head, v_token, v_head, sequences,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
    C: tl.constexpr, SEGMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Z, B and Γ of the whole segments, COLUMNS of the columns of Z or B a program.

    Grid: (⌊T / tokens of a segment⌋ + N) · HV · (ceil(K / COLUMNS) + ceil(V / COLUMNS)), the blocks of one head next to
    each other. Programs without a whole segment, of which there is at most one a sequence and block, end at once.

    Bytes of a chunk and block, in 16 bits: 128 (K + 64 + COLUMNS), mostly from the L2 cache. Operations: 128 COLUMNS
    (2 K + 64).

    Args:
        k: [T, H, K]; v: [T, HV, V]; slots: [N]; query_start_loc: [N + 1].
        solve, factors, decays: of the chunks.
        transitions: [segments, HV, K, K] for Z, in the dtype of the products.
        additions: [segments, HV, K, V] float32 for Bᵀ; spans: [segments, HV] float32 for Γ.
    """
    KEY_BLOCKS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    BLOCKS: tl.constexpr = KEY_BLOCKS + (V + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    block = program % BLOCKS
    head = (program // BLOCKS) % HV
    segment = program // (BLOCKS * HV)
    n = sequence_of_chunk(segment, query_start_loc, sequences, SEGMENT * C)
    start = tl.load(query_start_loc + n).to(tl.int64)
    length = tl.load(query_start_loc + n + 1).to(tl.int64) - start
    number = segment - (start // (SEGMENT * C) + n)
    if (number >= length // (SEGMENT * C)) | (tl.load(slots + n) < 0):
        return

    index = tl.arange(0, C)
    keys = tl.arange(0, BLOCK_K)
    key_columns = block * COLUMNS + tl.arange(0, COLUMNS)
    value_columns = key_columns - KEY_BLOCKS * COLUMNS
    of_keys = key_columns < K
    of_values = (value_columns >= 0) & (value_columns < V)
    inside = keys[None, :] < K
    S = tl.zeros([COLUMNS, BLOCK_K], tl.float32)
    span = 1.0
    for c in range(SEGMENT):
        tokens = start + (number * SEGMENT + c) * C + index
        entry = (start // C + n + number * SEGMENT + c) * HV + head
        vector = factors + entry * 3 * C + index
        row = k + tokens[:, None] * k_token + (head // (HV // H)) * k_head
        ks = tl.load(row + keys[None, :], mask=inside, other=0.0).to(solve.dtype.element_ty)
        initial = tl.load(row + key_columns[None, :], mask=of_keys[None, :], other=0.0)
        vs = tl.load(
            v + tokens[:, None] * v_token + head * v_head + value_columns[None, :], mask=of_values[None, :], other=0.0
        )
        from_start = tl.load(vector)
        vs = vs.to(tl.float32) - initial.to(tl.float32) * (from_start * span)[:, None]
        predicted = product(S.to(ks.dtype), tl.trans(ks), PRECISION) * from_start[None, :]
        M = tl.load(solve + entry * C * C + index[:, None] * C + index[None, :])
        new = product((tl.trans(vs) - predicted).to(ks.dtype), tl.trans(M), PRECISION)
        decay = tl.load(decays + entry)
        S = sum_of_products((new * tl.load(vector + 2 * C)[None, :]).to(ks.dtype), ks, S * decay, PRECISION)
        span *= decay
    entry = segment.to(tl.int64) * HV + head
    transition = transitions + entry * K * K + key_columns[:, None] * K + keys[None, :]
    tl.store(transition, S.to(transitions.dtype.element_ty), mask=of_keys[:, None] & inside)
    tl.store(
        additions + entry * K * V + value_columns[:, None] * K + keys[None, :], S, mask=of_values[:, None] & inside
    )
    tl.store(spans + entry, span, mask=block == 0)


@triton.jit
def start_kernel(  # type: ignore[no-untyped-def]
    state, starts, slots, query_start_loc, has_initial, transitions, additions, spans, state_slot,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The states before the segments, BLOCK_V of their value dimensions a program, of one head of one sequence.

    Grid: N · HV · ceil(V / BLOCK_V). Bytes of a segment and block: K (2 K + 8 BLOCK_V) in 16 bits. Operations:
    2 K² BLOCK_V.

    Args:
        state: [slots, HV, V, K], read where ``has_initial``; a slot is ``state_slot`` elements from the next.
        starts: [segments, HV, K, V] float32, also that behind the last whole segment.
        slots, has_initial: [N]; query_start_loc: [N + 1].
        transitions, additions, spans: of :func:`transition_kernel`; TOKENS: of a segment.
    """
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    head = (program // BLOCKS) % HV
    n = program // (BLOCKS * HV)
    keys = tl.arange(0, BLOCK_K)
    values = (program % BLOCKS) * BLOCK_V + tl.arange(0, BLOCK_V)
    start = tl.load(query_start_loc + n).to(tl.int64)
    whole = ((tl.load(query_start_loc + n + 1).to(tl.int64) - start) // TOKENS).to(tl.int32)
    slot = tl.load(slots + n).to(tl.int64)
    if slot < 0:
        return

    inside = (values[:, None] < V) & (keys[None, :] < K)
    rows = head * V * K + values[:, None] * K + keys[None, :]
    known = tl.load(has_initial + n) != 0
    S = tl.load(state + slot * state_slot + rows, mask=inside & known, other=0.0).to(tl.float32)
    square = (keys[:, None] < K) & (keys[None, :] < K)
    first_entry = start // TOKENS + n
    for segment in range(whole):
        entry = (first_entry + segment) * HV
        Z = tl.load(transitions + (entry + head) * K * K + keys[:, None] * K + keys[None, :], mask=square, other=0.0)
        B = tl.load(additions + entry * K * V + rows, mask=inside, other=0.0)
        tl.store(starts + entry * K * V + rows, S, mask=inside)
        B = sum_of_products(S.to(Z.dtype), Z, B, PRECISION)
        S = (S * tl.load(spans + entry + head) + B).to(state.dtype.element_ty).to(tl.float32)
    tl.store(starts + (first_entry + whole) * HV * K * V + rows, S, mask=inside)


@triton.jit(do_not_specialize=["sequences", "with_snapshots"])
def segment_kernel(  # type: ignore[no-untyped-def]
    q, k, v, out, state, starts, slots, query_start_loc, snapshot_slots, snapshot_lengths,
    solve, attend, factors, decays, tiles_q, tiles_k, tiles_v, tiles_solve, tiles_attend,
    state_slot, sequences, with_snapshots,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr, v_token: tl.constexpr,
    v_head: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, C: tl.constexpr, SEGMENT: tl.constexpr, SHORT: tl.constexpr, PRECISION: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Outputs of BLOCK_V of the value dimensions of one value head of one segment, chunk after chunk.

    A sequence's last segment, which may have no chunk, writes its final state. Outputs of skipped sequences are zeroed.

    Grid: (⌊T / tokens of a segment⌋ + N) · HV · ceil(V / BLOCK_V), the blocks of one head next to each other. Programs
    without a segment end at once. Bytes and operations of a chunk: those of the serial walk.

    Args:
        starts: of :func:`start_kernel`; SEGMENT: chunks; others as in the serial walk.
    """
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    head = (program // BLOCKS) % HV
    segment = program // (BLOCKS * HV)
    n = sequence_of_chunk(segment, query_start_loc, sequences, SEGMENT * C)
    start = tl.load(query_start_loc + n).to(tl.int64)
    end = tl.load(query_start_loc + n + 1).to(tl.int64)
    number = (segment - (start // (SEGMENT * C) + n)).to(tl.int32)
    last = ((end - start) // (SEGMENT * C)).to(tl.int32)
    if number > last:
        return

    keys = tl.arange(0, BLOCK_K)
    first_value = (program % BLOCKS) * BLOCK_V
    length = (end - start).to(tl.int32)
    length -= tl.where(length % C <= SHORT, length % C, 0)
    first_chunk = number * SEGMENT
    first_entry = (start // C + n).to(tl.int32) * HV + head
    slot = tl.load(slots + n).to(tl.int64)
    live = slot >= 0
    has_snapshot = live & (with_snapshots != 0)
    snapshot = tl.load(snapshot_slots + n, mask=has_snapshot, other=-1).to(tl.int64)
    has_snapshot = has_snapshot & (snapshot >= 0)
    snapshot_at = tl.load(snapshot_lengths + n, mask=has_snapshot, other=-1).to(tl.int32)
    inside = (first_value + tl.arange(0, BLOCK_V)[:, None] < V) & (keys[None, :] < K)
    tile = state + (head * V + first_value) * K
    initial = starts + ((segment.to(tl.int64) * HV + head) * V + first_value) * K
    S = tl.load(rows_at(initial, K, keys, BLOCK_V), mask=inside & live, other=0.0)

    whole = length // C
    behind = tl.where(live, tl.minimum(first_chunk + SEGMENT, whole), first_chunk)
    tail = tl.where(live & (number == last), length % C, 0)
    pause = snapshot_at // C
    between = (snapshot_at % C == 0) & (snapshot_at <= whole * C)
    between = between & (snapshot_at >= first_chunk * C) & (pause < first_chunk + SEGMENT)
    place = tile + snapshot * state_slot
    S = walk(
        S, q, k, v, out, solve, attend, factors, decays, tiles_q, tiles_k, tiles_v, tiles_solve, tiles_attend,
        start, first_chunk, behind, tail, tl.where(between, pause, -1), place,
        first_entry, head, first_value, q_token, q_head, k_token, k_head, v_token, v_head,
        H, HV, K, V, BLOCK_K, BLOCK_V, C, PRECISION, tl.float32, TILES,
    )  # fmt: skip
    final = S.to(state.dtype.element_ty)
    if (number == last) & (length == snapshot_at):
        tl.store(rows_at(place, K, keys, BLOCK_V), final, mask=inside)
    if (number == last) & live & (length > 0):
        tl.store(rows_at(tile + slot * state_slot, K, keys, BLOCK_V), final, mask=inside)
    chunks = tl.where(live, 0, (length + C - 1) // C)
    store_zeros(
        out, start, first_chunk, tl.minimum(first_chunk + SEGMENT, chunks), length, head, first_value, HV, V, BLOCK_V, C
    )


class SegmentConfiguration(Configuration):
    """Block sizes, warps and stages of the kernels here: from shapes, dtype and target, never from the batch."""

    def __init__(self, key_dim: int, value_dim: int, dtype: torch.dtype, target: Target) -> None:
        super().__init__(key_dim, value_dim, dtype, target)
        wide = self.products == torch.bfloat16
        roomy = wide and target.nvidia and target.shared_memory > 200 << 10
        widest = max(16, power_of_two(value_dim))
        self.columns = min(max(widest, self.block_k), 64 if roomy and target.wgmma else 32)
        self.transition_warps, self.transition_stages = 4, 2 if roomy else 1
        # One head and sequence should have many programs, as a step waits for the one before it.
        self.start_block, self.start_warps, self.start_stages = 16, 4, 2 if roomy and target.wgmma else 1
        if target.nvidia and not wide:
            # Rows of a state are a factor in every warp, and in float32 twice as many registers.
            self.start_warps = 8
        if self.precision == "tf32x3":
            self.columns, self.transition_warps = 16, 8


def run_segments(
    tokens: tuple[Tensor, ...],
    out: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    has_initial: Tensor,
    snapshots: tuple[Tensor, Tensor] | None,
) -> None:
    """Launch the kernel of the chunks and the three here; arguments as of ``run_chunked``.

    Between them lie, beside what belongs to chunks, 160 KiB for every segment and value head in bfloat16: 320 bytes a
    token and head.
    """
    q, k, v, *_ = tokens
    num_tokens, value_heads, value_dim = v.shape
    key_dim, sequences = q.shape[2], slots.shape[0]
    if sequences == 0:
        return
    config = SegmentConfiguration(key_dim, value_dim, v.dtype, current_target())
    chunks, shapes = solve_chunks(tokens, slots, query_start_loc, config)
    solve, _, factors, decays = chunks
    entries = (num_tokens // (SEGMENT * CHUNK_SIZE) + sequences, value_heads)
    transitions = torch.empty(*entries, key_dim, key_dim, dtype=config.products, device=v.device)
    additions, starts = torch.empty(2, *entries, key_dim, value_dim, dtype=torch.float32, device=v.device)
    spans = torch.empty(entries, dtype=torch.float32, device=v.device)
    blocks = ceil_div(key_dim, config.columns) + ceil_div(value_dim, config.columns)
    launch(
        transition_kernel, (entries[0] * value_heads * blocks,),
        k, v, slots, query_start_loc, solve, factors, decays, transitions, additions, spans,
        *k.stride()[:2], *v.stride()[:2], sequences,
        V=value_dim, COLUMNS=config.columns, SEGMENT=SEGMENT,
        num_warps=config.transition_warps, num_stages=config.transition_stages, **shapes,
    )  # fmt: skip
    launch(
        start_kernel, (sequences * value_heads * ceil_div(value_dim, config.start_block),),
        state, starts, slots, query_start_loc, has_initial, transitions, additions, spans, state.stride(0),
        HV=value_heads, K=key_dim, V=value_dim, BLOCK_K=config.block_k, BLOCK_V=config.start_block,
        TOKENS=SEGMENT * CHUNK_SIZE, PRECISION=config.precision,
        num_warps=config.start_warps, num_stages=config.start_stages, enable_fp_fusion=True,
    )  # fmt: skip
    gluon_walk = gluon_walk_for(q, k, v, state)
    if gluon_walk is not None:
        batch = state, slots, query_start_loc, has_initial, snapshots, chunks
        gluon_walk.run_gluon_walk(tokens, out, *batch, starts=starts, segment=SEGMENT)
        return
    snapshot_slots, snapshot_lengths = snapshots if snapshots is not None else (slots, slots)
    tiles = tiles_of(q, k, v, chunks, config)
    launch(
        segment_kernel, (entries[0] * value_heads * ceil_div(value_dim, config.block_v),),
        q, k, v, out, state, starts, slots, query_start_loc, snapshot_slots, snapshot_lengths, *chunks, *tiles,
        state.stride(0), sequences, int(snapshots is not None), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        V=value_dim, BLOCK_V=config.block_v, SEGMENT=SEGMENT, SHORT=RECURRENT_TOKENS, TILES=tiles[0] is not None,
        num_warps=config.state_warps, num_stages=config.stages, **shapes,
    )  # fmt: skip
