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
from qnext_kernels.triton_support import aligned_rows, power_of_two, rows

TOKENS, CHANNELS = 32, 128
"""Of a program of a prefill: two vectors of 16 bytes a thread in bfloat16."""
VERIFIED_CHANNELS = 256
"""Of a program of a verify or decode: of one token, a warp's vectors of 16 bytes."""
_NOT_COMPILED_IN = ["sequences", "with_snapshots", "most_columns", "most_steps"]
_OF_ANY_ALIGNMENT = [
    "slots", "query_start_loc", "has_initial", "snapshot_slots", "snapshot_lengths", "accepted", "step_rows",
]  # fmt: skip


@triton.jit
def inputs_behind(  # type: ignore[no-untyped-def]
    count, limit, x, x_token, history, history_channel, history_column, known, length, channel, end,
    W: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As the pool keeps them, inputs ``count`` to ``count + limit`` of [W − 1 earlier ones, tokens].

    Returns them [COLUMNS, channels], and which of those there are: of channels before ``end``.
    """
    column = tl.arange(0, COLUMNS)[:, None]
    source = count + column - (W - 1)
    there = (column < limit) & (source < length) & (channel[None, :] < end)
    tokens = tl.load(x + source.to(tl.int64) * x_token + channel[None, :], mask=there & (source >= 0), other=0.0)
    of_column = (source + (W - 1)).to(tl.int64) * history_column
    earlier_at = channel.to(tl.int64)[None, :] * history_channel + of_column
    earlier = tl.load(history + earlier_at, mask=there & (source < 0) & known, other=0.0)
    return tl.where(source < 0, earlier, tokens.to(history.dtype.element_ty)), there


@triton.jit
def convolve(  # type: ignore[no-untyped-def]
    first, x, x_token, history, history_channel, history_column, known, length, weight, channel, end,
    WITH_HISTORY: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """SiLU(Σ_w weight[d, w] · input[t − (W − 1) + w, d]) of TOKENS tokens of a sequence, from its token ``first`` on.

    Args:
        x: the sequence's first token, ``length`` of them ``x_token`` elements apart.
        history: the first of the W − 1 inputs before it; taken for zero unless WITH_HISTORY and ``known``.
        weight: contiguous [D, W].
        channel: [channels], of those before ``end``.
    """
    tap = tl.arange(0, BLOCK_W)[None, :]
    inside = channel[None, :] < end
    # A thread loads the weights of a channel at once. Adding −0 to the one that is meant changes nothing.
    taps = tl.load(weight + channel[:, None] * W + tap, mask=(channel[:, None] < end) & (tap < W), other=0.0)
    taps = taps.to(tl.float32)
    token = first + tl.arange(0, TOKENS)[:, None]
    total = tl.zeros([TOKENS, channel.shape[0]], tl.float32)
    for w in tl.static_range(W):
        source = token + (w - (W - 1))
        mask = inside & (token < length) & (source >= 0)
        value = tl.load(x + source.to(tl.int64) * x_token + channel[None, :], mask=mask, other=0.0)
        if w < W - 1:
            value = value.to(history.dtype.element_ty)
            if WITH_HISTORY:
                of_column = (token + w).to(tl.int64) * history_column
                earlier_at = channel.to(tl.int64)[None, :] * history_channel + of_column
                earlier = tl.load(history + earlier_at, mask=inside & (source < 0) & known, other=0.0)
                value = tl.where(source < 0, earlier, value)
        weights = tl.sum(tl.where(tap == w, taps, -0.0), axis=1)[None, :]
        value = value.to(tl.float32)
        total = value * weights if w == 0 else tl.fma(value, weights, total)
    return silu(total)


@triton.jit(do_not_specialize=_NOT_COMPILED_IN, do_not_specialize_on_alignment=_OF_ANY_ALIGNMENT)
def prefill_kernel(  # type: ignore[no-untyped-def]
    x, weight, y, pool, slots, query_start_loc, has_initial, snapshot_slots, snapshot_lengths,
    x_token, x_head, pool_slot, pool_channel, pool_column, sequences, with_snapshots,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one sequence, CHANNELS of their channels.

    The program of a sequence's first tokens also leaves the sequence's last inputs, and its snapshot, in the pool: no
    other one reads the slot, and this one has before it writes.

    Grid: (⌊T / TOKENS⌋ + N) · H · (2 ceil(K / CHANNELS) + ceil(V / CHANNELS)). Bytes: x read once, and of every TOKENS
    tokens W − 1 again from a cache; y written once.

    Args:
        x: [T, H, 2 K + V], of every key head its q, k and v; with H = 1 and K = 0 one of channels in any order.
        weight: contiguous [D, W], y: contiguous [T, D], of the channels of all q, of all k and of all v.
        pool: [slots, D, W − 1 or more], of any strides.
        slots, has_initial, snapshot_slots, snapshot_lengths: contiguous [N]; query_start_loc: [N + 1].
        with_snapshots: 0: the last two are not read.
    """
    D: tl.constexpr = H * (2 * K + V)
    OF_KEYS: tl.constexpr = (K + CHANNELS - 1) // CHANNELS
    OF_HEAD: tl.constexpr = 2 * OF_KEYS + (V + CHANNELS - 1) // CHANNELS
    chunk = tl.program_id(0) // (H * OF_HEAD)
    block = tl.program_id(0) % (H * OF_HEAD)
    head = block // OF_HEAD
    block %= OF_HEAD
    part = tl.where(block < OF_KEYS, 0, tl.where(block < 2 * OF_KEYS, 1, 2))
    size = tl.where(part < 2, K, V)
    of_part = part * H * K + head * size
    end = of_part + size
    channel = of_part + (block - part * OF_KEYS) * CHANNELS + tl.arange(0, CHANNELS)
    n = sequence_of_chunk(chunk, query_start_loc, sequences, TOKENS)
    start = tl.load(query_start_loc + n).to(tl.int64)
    length = (tl.load(query_start_loc + n + 1) - start).to(tl.int32)
    first = ((chunk - n - start // TOKENS) * TOKENS).to(tl.int32)
    slot = tl.load(slots + n).to(tl.int64)
    live = slot >= 0
    known = live & (tl.load(has_initial + n) != 0)
    tokens = x + start * x_token + head * x_head + (part * K - of_part)
    history = pool + slot * pool_slot

    result = convolve(
        first, tokens, x_token, history, pool_channel, pool_column, known, length, weight, channel, end,
        False, W, BLOCK_W, TOKENS,
    )  # fmt: skip
    token = first + tl.arange(0, TOKENS)[:, None]
    inside = (token < length) & (channel[None, :] < end) & ((token >= W - 1) | (live == 0))
    of_tokens = y + start * D + channel[None, :]
    tl.store(of_tokens + token.to(tl.int64) * D, tl.where(live, result, 0.0).to(y.dtype.element_ty), mask=inside)

    if (first == 0) & live:
        early = convolve(
            0, tokens, x_token, history, pool_channel, pool_column, known, length, weight, channel, end,
            True, W, BLOCK_W, COLUMNS,
        )  # fmt: skip
        column = tl.arange(0, COLUMNS)[:, None]
        has_history = (column < tl.minimum(length, W - 1)) & (channel[None, :] < end)
        tl.store(of_tokens + column * D, early.to(y.dtype.element_ty), mask=has_history)

        at = channel.to(tl.int64)[None, :] * pool_channel + column.to(tl.int64) * pool_column
        snapshot = tl.load(snapshot_slots + n, mask=with_snapshots != 0, other=-1).to(tl.int64)
        behind = tl.load(snapshot_lengths + n, mask=snapshot >= 0, other=0).to(tl.int64)
        behind = tl.minimum(tl.maximum(behind, 0), length).to(tl.int32)
        last, there = inputs_behind(
            length, W - 1, tokens, x_token, history, pool_channel, pool_column, known, length, channel, end,
            W, COLUMNS,
        )  # fmt: skip
        kept, kept_there = inputs_behind(
            behind, W - 1, tokens, x_token, history, pool_channel, pool_column, known, length, channel, end,
            W, COLUMNS,
        )  # fmt: skip
        # What one thread stores, another may have yet to load.
        tl.debug_barrier()
        tl.store(history + at, last, mask=there & (length > 0))
        tl.store(pool + snapshot * pool_slot + at, kept, mask=kept_there & (snapshot >= 0))


@triton.jit(
    do_not_specialize=["ragged", "most_columns", "most_steps"], do_not_specialize_on_alignment=_OF_ANY_ALIGNMENT
)
def verify_kernel(  # type: ignore[no-untyped-def]
    x, weight, y, pool, steps, slots, query_start_loc, accepted, step_rows,
    x_token, pool_slot, pool_channel, pool_column, steps_row, steps_step, steps_channel, steps_column,
    most_columns, most_steps,
    RAGGED: tl.constexpr, IN_STEPS: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    BLOCK_W: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """All tokens of one sequence, CHANNELS of their channels.

    Grid: N · ceil(D / CHANNELS). Bytes: x and the inputs before it read; y and as many inputs as those and the tokens
    behind the first written, or W − 1 a token into a step pool.

    Args:
        x: [T, D]; weight: contiguous [D, W]; y: contiguous [T, D].
        pool: [slots, D, most_columns], steps: [rows, most_steps, D, W − 1], of any strides.
        slots, accepted, step_rows: contiguous [N]; query_start_loc: [N + 1].
        RAGGED: else a decode: sequence n is token n behind one accepted; offsets and ``accepted`` are not read.
        IN_STEPS: else there is no step pool, and the inputs go to columns 0 and further of the slot.
    """
    BLOCKS: tl.constexpr = (D + CHANNELS - 1) // CHANNELS
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    channel = tl.program_id(0) % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    slot = tl.load(slots + n).to(tl.int64)
    live = slot >= 0
    of_slot = pool + slot * pool_slot
    if RAGGED:
        start = tl.load(query_start_loc + n).to(tl.int64)
        length = (tl.load(query_start_loc + n + 1) - start).to(tl.int32)
        offset = tl.load(accepted + n).to(tl.int64) - 1
        history = of_slot + tl.minimum(tl.maximum(offset, 0), most_columns - (W - 1)) * pool_column
    else:
        start, length, history = n, 1, of_slot
    tokens = x + start * x_token

    for first in range(0, length, TOKENS):
        result = convolve(
            first, tokens, x_token, history, pool_channel, pool_column, live, length, weight, channel, D,
            True, W, BLOCK_W, TOKENS,
        )  # fmt: skip
        token = first + tl.arange(0, TOKENS)[:, None]
        y_at = (start + token) * D + channel[None, :]
        inside = (token < length) & (channel[None, :] < D)
        tl.store(y + y_at, tl.where(live, result, 0.0).to(y.dtype.element_ty), mask=inside)

    column = tl.arange(0, COLUMNS)[:, None]
    if IN_STEPS:
        row = tl.load(step_rows + n).to(tl.int64)
        step = (
            steps + row * steps_row + channel.to(tl.int64)[None, :] * steps_channel + column.to(tl.int64) * steps_column
        )
        for t in range(tl.minimum(length, most_steps)):
            inputs, there = inputs_behind(
                t + 1, W - 1, tokens, x_token, history, pool_channel, pool_column, live, length, channel, D,
                W, COLUMNS,
            )  # fmt: skip
            tl.store(step, inputs, mask=there & live & (row >= 0))
            step += steps_step
    else:
        inputs, there = inputs_behind(
            1, most_columns, tokens, x_token, history, pool_channel, pool_column, live, length, channel, D,
            W, COLUMNS,
        )  # fmt: skip
        # What one thread stores, another may have yet to load.
        tl.debug_barrier()
        at = of_slot + channel.to(tl.int64)[None, :] * pool_channel + column.to(tl.int64) * pool_column
        tl.store(at, inputs, mask=there & live & (length > 0))


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
    blocks = heads * (2 * triton.cdiv(key_dim, CHANNELS) + triton.cdiv(value_dim, CHANNELS))
    snapshot_slots, snapshot_lengths = (slots, slots) if snapshots is None else (s.contiguous() for s in snapshots)
    prefill_kernel[((num_tokens // TOKENS + sequences) * blocks,)](
        x, aligned_rows(weight.contiguous()), y, pool,
        slots, query_start_loc.contiguous(), has_initial.contiguous(), snapshot_slots, snapshot_lengths,
        *x.stride()[:2], *pool.stride(), sequences, int(snapshots is not None),
        H=heads, K=key_dim, V=value_dim, W=width, BLOCK_W=power_of_two(width), COLUMNS=power_of_two(width - 1),
        TOKENS=TOKENS, CHANNELS=CHANNELS, num_warps=8, num_stages=1, enable_fp_fusion=False,
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
) -> None:
    """Launch :func:`verify_kernel`, without offsets for a decode; y [T, D], contiguous, and a pool are written."""
    channels, width, sequences = x.shape[1], weight.shape[1], slots.shape[0]
    if sequences == 0 or channels == 0:
        return
    x, slots = rows(x), slots.contiguous()
    offsets, taken, step_pool, step_rows, most = slots, slots, pool, slots, 1
    if query_start_loc is not None and accepted is not None:
        offsets, taken, most = query_start_loc.contiguous(), accepted.contiguous(), pool.shape[2] - width + 2
    if steps is not None:
        step_pool, step_rows, most = steps[0], steps[1].contiguous(), steps[0].shape[1]
    block = min(8, power_of_two(most))
    verify_kernel[(sequences * triton.cdiv(channels, VERIFIED_CHANNELS),)](
        x, aligned_rows(weight.contiguous()), y, pool, step_pool, slots, offsets, taken, step_rows,
        x.stride(0), *pool.stride(), *((0, 0, 0, 0) if steps is None else step_pool.stride()), pool.shape[2], most,
        RAGGED=query_start_loc is not None, IN_STEPS=steps is not None, D=channels, W=width,
        BLOCK_W=power_of_two(width), COLUMNS=power_of_two(width - 1 if steps is not None else most + width - 2),
        TOKENS=block, CHANNELS=VERIFIED_CHANNELS,
        # A thread can take 16 bytes at once where channels are contiguous; else neighbours take what lies together.
        num_warps=block if pool.stride(1) == 1 else min(8, 4 * block), num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
