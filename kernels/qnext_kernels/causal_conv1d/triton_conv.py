"""The convolution over ragged batches: a prefill by blocks of tokens, decode and verify by sequences, one launch each.

They share :func:`convolve` and are compiled without contraction of its products and sums, so that a token has the same
bits wherever it is computed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.gated_delta_rule.triton_chunked import sequence_of_chunk
from qnext_kernels.triton_elementwise import silu
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_overlap import overlapping_here, wait_for_launch_in_front
from qnext_kernels.triton_support import aligned_rows, ceil_div, power_of_two, rows

CHANNELS, RUNS, STEPS = 128, 16, 8
"""Of a program of a prefill: so many runs of so many tokens; a thread goes along one with a vector of 16 bytes."""
FEW, MANY = (256, 4), (1024, 4)
"""Channels and warps of a program of a verify or decode. Where programs are few, a thread has two channels and is soon
done; many would take longer to start than to run, and a thread takes vectors of 16 bytes. Channels that lie head by
head, of which one has 512 in the published model, are always taken as few. The bits are the same."""
FEW_PROGRAMS = 2048
LONGEST_BLOCK = 8
"""Tokens that a program of a verify loads at once."""
_NOT_COMPILED_IN = ["sequences", "with_snapshots", "most_columns", "most_steps"]
_OF_ANY_ALIGNMENT = [
    "slots", "query_start_loc", "has_initial", "snapshot_slots", "snapshot_lengths", "accepted", "step_rows",
]  # fmt: skip


@triton.jit
def inputs_behind(  # type: ignore[no-untyped-def]
    count, limit, x, x_token, history, history_channel, history_column, known, length, channel, inside,
    W: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As the pool keeps them, inputs ``count`` to ``count + limit`` of [W − 1 earlier ones, tokens].

    Returns them [COLUMNS, channels], and which of those there are: of channels ``inside``.
    """
    column = tl.arange(0, COLUMNS)[:, None]
    source = count + column - (W - 1)
    there = (column < limit) & (source < length) & inside[None, :]
    tokens = tl.load(x + source.to(tl.int64) * x_token + channel[None, :], mask=there & (source >= 0), other=0.0)
    of_column = (source + (W - 1)).to(tl.int64) * history_column
    earlier_at = channel.to(tl.int64)[None, :] * history_channel + of_column
    earlier = tl.load(history + earlier_at, mask=there & (source < 0) & known, other=0.0)
    return tl.where(source < 0, earlier, tokens.to(history.dtype.element_ty)), there


@triton.jit
def taps_of(weight, channel, inside, W: tl.constexpr, BLOCK_W: tl.constexpr):  # type: ignore[no-untyped-def]
    """The W weights of each channel, float32 [channels] each; ``weight``: contiguous [D, W]."""
    apart = []
    if W == 4 and weight.dtype.element_ty.primitive_bitwidth == 16:
        # Those of a channel are one integer, so that a thread takes them as it takes the channel.
        four = tl.load(weight.to(tl.pointer_type(tl.int64)) + channel, mask=inside, other=0)
        for w in tl.static_range(W):
            tap = (four >> (16 * w)).to(tl.int16).to(weight.dtype.element_ty, bitcast=True)
            apart += [tap.to(tl.float32)]
    else:
        tap = tl.arange(0, BLOCK_W)[None, :]
        # A thread loads the weights of a channel at once. Adding −0 to the one that is meant changes nothing.
        taps = tl.load(weight + channel[:, None] * W + tap, mask=inside[:, None] & (tap < W), other=0.0).to(tl.float32)
        for w in tl.static_range(W):
            apart += [tl.sum(tl.where(tap == w, taps, -0.0), axis=1)]
    return apart


@triton.jit
def convolve(inputs, token, taps, s: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """SiLU(Σ_w taps[w] · input w) of ``token`` behind inputs s to s + W − 2, which have the dtype of the pool."""
    total = token.to(tl.float32)
    for w in tl.static_range(W):
        value = token.to(tl.float32) if w == W - 1 else inputs[s + w].to(tl.float32)
        total = value * taps[w] if w == 0 else tl.fma(value, taps[w], total)
    return silu(total)


@triton.jit(do_not_specialize=_NOT_COMPILED_IN, do_not_specialize_on_alignment=_OF_ANY_ALIGNMENT)
def prefill_kernel(  # type: ignore[no-untyped-def]
    x, weight, y, pool, slots, query_start_loc, has_initial, snapshot_slots, snapshot_lengths,
    x_token, x_head, pool_slot, pool_channel, pool_column, sequences, with_snapshots,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, COLUMNS: tl.constexpr,
    RUNS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """RUNS · STEPS tokens of one sequence, CHANNELS of their channels.

    A thread goes along a run of STEPS tokens and keeps what it has loaded, so that an input is loaded and converted
    once for its W products; only the W − 1 inputs before a run are loaded twice. The program of a sequence's first
    tokens also leaves the sequence's last inputs, and its snapshot, in the pool: no other one reads the slot, and this
    one has before it writes.

    Grid: (⌊T / (RUNS · STEPS)⌋ + N) · H · (2 ceil(K / CHANNELS) + ceil(V / CHANNELS)). Bytes: x read once, and of every
    STEPS tokens W − 1 again from a cache; y written once.

    Args:
        x: [T, H, 2 K + V], of every key head its q, k and v; with H = 1 and K = 0 one of channels in any order.
        weight: contiguous [D, W], y: contiguous [T, D], of the channels of all q, of all k and of all v.
        pool: [slots, D, W − 1 or more], of any strides.
        slots, has_initial, snapshot_slots, snapshot_lengths: contiguous [N]; query_start_loc: [N + 1].
        with_snapshots: 0: the last two are not read.
    """
    D: tl.constexpr = H * (2 * K + V)
    TOKENS: tl.constexpr = RUNS * STEPS
    OF_KEYS: tl.constexpr = (K + CHANNELS - 1) // CHANNELS
    OF_HEAD: tl.constexpr = 2 * OF_KEYS + (V + CHANNELS - 1) // CHANNELS
    chunk = tl.program_id(0) // (H * OF_HEAD)
    block = tl.program_id(0) % (H * OF_HEAD)
    head = block // OF_HEAD
    block %= OF_HEAD
    part = tl.where(block < OF_KEYS, 0, tl.where(block < 2 * OF_KEYS, 1, 2))
    size = tl.where(part < 2, K, V)
    of_part = part * H * K + head * size
    within = (block - part * OF_KEYS) * CHANNELS + tl.arange(0, CHANNELS)
    inside = within < size
    channel = of_part + within
    wait_for_launch_in_front(OVERLAPS)
    n = sequence_of_chunk(chunk, query_start_loc, sequences, TOKENS)
    start = tl.load(query_start_loc + n).to(tl.int64)
    length = (tl.load(query_start_loc + n + 1) - start).to(tl.int32)
    first = ((chunk - n - start // TOKENS) * TOKENS).to(tl.int32)
    slot = tl.load(slots + n).to(tl.int64)
    live = slot >= 0
    known = live & (tl.load(has_initial + n) != 0)
    tokens = x + start * x_token + head * x_head + part * K - of_part
    history = pool + slot * pool_slot

    token = first + tl.arange(0, RUNS)[:, None] * STEPS
    # Without a sequence every input is 0, and with them the results.
    there = inside[None, :] & live
    run = tokens + token.to(tl.int64) * x_token + channel[None, :]
    inputs = []
    for w in tl.static_range(W - 1):
        source = token + (w - (W - 1))
        mask = there & (source >= 0) & (source < length)
        value = tl.load(run + (w - (W - 1)) * x_token, mask=mask, other=0.0).to(pool.dtype.element_ty)
        if first == 0:
            of_column = (token + w).to(tl.int64) * pool_column
            earlier_at = channel.to(tl.int64)[None, :] * pool_channel + of_column
            earlier = tl.load(history + earlier_at, mask=inside[None, :] & (source < 0) & known, other=0.0)
            value = tl.where(source < 0, earlier, value)
        inputs += [value]
    arrived = []
    for s in tl.static_range(STEPS):
        value = tl.load(run + s * x_token, mask=there & (token + s < length), other=0.0)
        arrived += [value]
        inputs += [value.to(pool.dtype.element_ty)]
    taps = taps_of(weight, channel, inside, W, BLOCK_W)
    of_tokens = y + (start + token) * D + channel[None, :]
    for s in tl.static_range(STEPS):
        result = convolve(inputs, arrived[s], taps, s, W)
        tl.store(of_tokens + s * D, result.to(y.dtype.element_ty), mask=inside[None, :] & (token + s < length))

    if (first == 0) & live:
        column = tl.arange(0, COLUMNS)[:, None]
        at = channel.to(tl.int64)[None, :] * pool_channel + column.to(tl.int64) * pool_column
        snapshot = tl.load(snapshot_slots + n, mask=with_snapshots != 0, other=-1).to(tl.int64)
        behind = tl.load(snapshot_lengths + n, mask=snapshot >= 0, other=0).to(tl.int64)
        behind = tl.minimum(tl.maximum(behind, 0), length).to(tl.int32)
        last, last_there = inputs_behind(
            length, W - 1, tokens, x_token, history, pool_channel, pool_column, known, length, channel, inside,
            W, COLUMNS,
        )  # fmt: skip
        kept, kept_there = inputs_behind(
            behind, W - 1, tokens, x_token, history, pool_channel, pool_column, known, length, channel, inside,
            W, COLUMNS,
        )  # fmt: skip
        # What one thread stores, another may have yet to load.
        tl.debug_barrier()
        tl.store(history + at, last, mask=last_there & (length > 0))
        tl.store(pool + snapshot * pool_slot + at, kept, mask=kept_there & (snapshot >= 0))


@triton.jit(
    do_not_specialize=["ragged", "most_columns", "most_steps"], do_not_specialize_on_alignment=_OF_ANY_ALIGNMENT
)
def verify_kernel(  # type: ignore[no-untyped-def]
    x, weight, y, pool, steps, slots, query_start_loc, accepted, step_rows,
    x_token, x_head, pool_slot, pool_channel, pool_column, steps_row, steps_step, steps_channel, steps_column,
    most_columns, most_steps,
    RAGGED: tl.constexpr, IN_STEPS: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    BLOCK_W: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """All tokens of one sequence, CHANNELS of the channels of a key head.

    Grid: N · H · ceil((2 K + V) / CHANNELS). Bytes: x and the inputs before it read; y and as many inputs as those and
    the tokens behind the first written, or W − 1 a token into a step pool.

    Args:
        x, weight, y: of ``prefill_kernel``.
        pool: [slots, D, most_columns], steps: [rows, most_steps, D, W − 1], of any strides.
        slots, accepted, step_rows: contiguous [N]; query_start_loc: [N + 1].
        RAGGED: else a decode: sequence n is token n behind one accepted; offsets and ``accepted`` are not read.
        IN_STEPS: else there is no step pool, and the inputs go to columns 0 and further of the slot.
    """
    D: tl.constexpr = H * (2 * K + V)
    BLOCKS: tl.constexpr = (2 * K + V + CHANNELS - 1) // CHANNELS
    n = (tl.program_id(0) // (H * BLOCKS)).to(tl.int64)
    head = tl.program_id(0) // BLOCKS % H
    within = tl.program_id(0) % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    inside = within < 2 * K + V
    channel = within
    if H > 1:
        of_keys = tl.where(within < K, head * K, (H - 1 + head) * K)
        channel += tl.where(within < 2 * K, of_keys, 2 * (H - 1) * K + head * V)
    x += head * x_head + within
    wait_for_launch_in_front(OVERLAPS)
    slot = tl.load(slots + n).to(tl.int64)
    live = slot >= 0
    own = pool + slot * pool_slot + channel.to(tl.int64) * pool_channel
    if RAGGED:
        start = tl.load(query_start_loc + n).to(tl.int64)
        length = (tl.load(query_start_loc + n + 1) - start).to(tl.int32)
        offset = tl.load(accepted + n).to(tl.int64) - 1
        history = own + tl.minimum(tl.maximum(offset, 0), most_columns - (W - 1)) * pool_column
    else:
        start, length, history = n, 1, own
    if IN_STEPS:
        row = tl.load(step_rows + n).to(tl.int64)
        step = steps + row * steps_row + channel.to(tl.int64) * steps_channel
        kept = inside & live & (row >= 0)
    else:
        step, kept = own, inside & live
    taps = taps_of(weight, channel, inside, W, BLOCK_W)

    for first in range(0, length, TOKENS):
        tokens = x + (start + first) * x_token
        inputs = []
        for w in tl.static_range(W - 1):
            source = first + w - (W - 1)
            earlier = tl.load(history + (first + w) * pool_column, mask=inside & live & (source < 0), other=0.0)
            value = tl.load(tokens + (w - (W - 1)) * x_token, mask=inside & live & (source >= 0), other=0.0)
            inputs += [tl.where(source < 0, earlier, value.to(pool.dtype.element_ty))]
        arrived = []
        for s in tl.static_range(TOKENS):
            value = tl.load(tokens + s * x_token, mask=inside & live & (first + s < length), other=0.0)
            arrived += [value]
            inputs += [value.to(pool.dtype.element_ty)]
        # What one thread stores, another may have yet to load.
        tl.debug_barrier()
        for s in tl.static_range(TOKENS):
            result = convolve(inputs, arrived[s], taps, s, W)
            at = y + (start + first + s) * D + channel
            tl.store(at, result.to(y.dtype.element_ty), mask=inside & (first + s < length))
        if IN_STEPS:
            for s in tl.static_range(TOKENS):
                mask = kept & (first + s < tl.minimum(length, most_steps))
                for w in tl.static_range(W - 1):
                    tl.store(step + w * steps_column, inputs[s + 1 + w], mask=mask)
                step += steps_step
        else:
            for i in tl.static_range(1, W - 1 + TOKENS):
                column = first + i - 1
                mask = kept & (column < most_columns)
                mask &= first == 0 if i < W - 1 else column < length + W - 2
                tl.store(own + column * pool_column, inputs[i], mask=mask)


def run_prefill(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    pool: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    has_initial: Tensor,
    snapshots: tuple[Tensor, Tensor] | None,
    key_dim: int | None,
) -> None:
    """Launch :func:`prefill_kernel`; y [T, D], contiguous, and the pool are written."""
    num_tokens, (channels, width), sequences = x.shape[0], weight.shape, slots.shape[0]
    if sequences == 0 or channels == 0:
        return
    x, slots = rows(x[:, None] if key_dim is None else x), slots.contiguous()
    key_dim = key_dim or 0
    heads, value_dim = x.shape[1], x.shape[2] - 2 * key_dim
    blocks = heads * (2 * ceil_div(key_dim, CHANNELS) + ceil_div(value_dim, CHANNELS))
    chunks = num_tokens // (RUNS * STEPS) + sequences
    snapshot_slots, snapshot_lengths = (slots, slots) if snapshots is None else (s.contiguous() for s in snapshots)
    launch(
        prefill_kernel, (chunks * blocks,),
        x, aligned_rows(weight.contiguous()), y, pool,
        slots, query_start_loc.contiguous(), has_initial.contiguous(), snapshot_slots, snapshot_lengths,
        *x.stride()[:2], *pool.stride(), sequences, int(snapshots is not None),
        H=heads, K=key_dim, V=value_dim, W=width, BLOCK_W=power_of_two(width), COLUMNS=power_of_two(width - 1),
        RUNS=RUNS, STEPS=STEPS, CHANNELS=CHANNELS, num_warps=8, num_stages=1, enable_fp_fusion=False,
        **overlapping_here(),
    )  # fmt: skip


def run_verify(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    pool: Tensor,
    slots: Tensor,
    query_start_loc: Tensor | None = None,
    accepted: Tensor | None = None,
    steps: tuple[Tensor, Tensor] | None = None,
    key_dim: int | None = None,
) -> None:
    """Launch :func:`verify_kernel`, without offsets for a decode; y [T, D], contiguous, and a pool are written.

    Args:
        x: [T, D]; or with ``key_dim`` [T, H, 2 K + V], what a key head has side by side.
    """
    (channels, width), sequences = weight.shape, slots.shape[0]
    if sequences == 0 or channels == 0:
        return
    x, slots = rows(x[:, None] if key_dim is None else x), slots.contiguous()
    key_dim = key_dim or 0
    heads, of_head = x.shape[1:]
    offsets, taken, step_pool, step_rows, most = slots, slots, pool, slots, 1
    if query_start_loc is not None and accepted is not None:
        offsets, taken, most = query_start_loc.contiguous(), accepted.contiguous(), pool.shape[2] - width + 2
    if steps is not None:
        step_pool, step_rows, most = steps[0], steps[1].contiguous(), steps[0].shape[1]
    # Later tokens find every input before them in x: what a program overwrites, its first block has read.
    block = max(min(most, LONGEST_BLOCK), 1 if query_start_loc is None or steps is not None else width - 1)
    of_program, warps = FEW if key_dim or sequences * ceil_div(channels, FEW[0]) <= FEW_PROGRAMS else MANY
    # A thread takes several channels at once where they are contiguous; else it has one, as of the pool so of x.
    if pool.stride(1) != 1:
        of_program, warps = FEW[0], FEW[0] // 32
    launch(
        verify_kernel, (sequences * heads * ceil_div(of_head, of_program),),
        x, aligned_rows(weight.contiguous()), y, pool, step_pool, slots, offsets, taken, step_rows,
        *x.stride()[:2], *pool.stride(), *((0, 0, 0, 0) if steps is None else step_pool.stride()),
        pool.shape[2], most,
        RAGGED=query_start_loc is not None, IN_STEPS=steps is not None,
        H=heads, K=key_dim, V=of_head - 2 * key_dim, W=width,
        BLOCK_W=power_of_two(width), TOKENS=block, CHANNELS=of_program,
        num_warps=warps, num_stages=1, enable_fp_fusion=False, **overlapping_here(),
    )  # fmt: skip
