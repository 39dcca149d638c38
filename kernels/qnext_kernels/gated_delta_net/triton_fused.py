"""Decode and verify of all that lies between the projections of a Gated DeltaNet layer, in one launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.causal_conv1d.triton_conv import convolve, taps_of
from qnext_kernels.gated_delta_net.checks import Steps
from qnext_kernels.gated_delta_rule.reference import L2_NORM_EPS
from qnext_kernels.gated_delta_rule.triton import expect_contiguous_slots
from qnext_kernels.gated_delta_rule.triton_recurrent import DECODE, VERIFY
from qnext_kernels.gated_delta_rule.triton_token import (
    cast_parts,
    keys_of_part,
    load_parts,
    load_token,
    part_of,
    step,
    store_parts,
)
from qnext_kernels.gated_norm.triton_norm import normalised_and_gated
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_overlap import overlapping_here, wait_for_launch_in_front
from qnext_kernels.triton_support import aligned_rows, power_of_two, rows

LARGEST_TILE = 64 * 128
"""Elements of a state that a program of 256 threads holds in registers: 32 a thread."""
_NOT_COMPILED_IN = ["ba_token", "ba_head", "columns", "most_tokens", "conv_columns", "num_tokens", "eps"]
_OF_ANY_ALIGNMENT = [
    "ba", "A_log", "dt_bias", "norm_weight", "slots", "query_start_loc", "accepted", "step_rows",
]  # fmt: skip


@triton.jit
def convolve_head(  # type: ignore[no-untyped-def]
    x, x_token, weight, mixed, mixed_token, history, target, conv_channel, conv_column,
    target_step, target_channel, target_column, tokens, live, kept, most, key_head,
    CALL: tl.constexpr, IN_STEPS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """q, k and v of a key head, all tokens of a sequence: the convolution of ``verify_kernel``, inputs kept as there.

    Args:
        x, mixed: at the head in the sequence's first token, which has its q, k and v one behind the other.
        history: at the first of W − 1 inputs before it; target: at the slot, or at the first step.
        kept: whether inputs go there; most: columns or steps that there are.
    """
    c = tl.arange(0, BLOCK_C)
    inside = c < 2 * K + G * V
    channel = tl.where(
        c < K, key_head * K + c, tl.where(c < 2 * K, (H - 1 + key_head) * K + c, 2 * (H - 1) * K + key_head * G * V + c)
    )
    x += c
    mixed += c
    arrived = tl.load(x, mask=inside & live & (tokens > 0), other=0.0)
    history += channel.to(tl.int64) * conv_channel
    inputs = []
    for w in tl.static_range(W - 1):
        inputs += [tl.load(history + w * conv_column, mask=inside & live, other=0.0)]
    taps = taps_of(weight, channel, inside, W, BLOCK_W)
    target += channel.to(tl.int64) * target_channel
    kept &= inside
    # What one thread stores, another may have yet to load.
    tl.debug_barrier()
    for t in range(tokens):
        following = arrived
        if CALL != DECODE:
            following = tl.load(x + (t + 1) * x_token, mask=inside & live & (t + 1 < tokens), other=0.0)
        inputs += [arrived.to(target.dtype.element_ty)]
        y = convolve(inputs, arrived, taps, 0, W)
        tl.store(mixed + t * mixed_token, y.to(mixed.dtype.element_ty), mask=inside)
        if IN_STEPS:
            for w in tl.static_range(W - 1):
                tl.store(target + t * target_step + w * target_column, inputs[w + 1], mask=kept & (t < most))
        else:
            for w in tl.static_range(1, W - 1):
                tl.store(target + (w - 1) * target_column, inputs[w], mask=kept & (t == 0))
            column = t + W - 2
            tl.store(target + column * target_column, inputs[W - 1], mask=kept & (column >= 0) & (column < most))
        later = []
        for w in tl.static_range(W - 1):
            later += [inputs[w + 1]]
        inputs = later
        arrived = following


@triton.jit
def normalise_outputs(  # type: ignore[no-untyped-def]
    out, z, z_token, weight, eps, row, tokens,
    H: tl.constexpr, G: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gated RMSNorm of ROWS outputs in place, those of a token's value heads next to each other."""
    t, member = row // G, row % G
    values = tl.arange(0, BLOCK)
    inside = (t < tokens)[:, None] & (values < V)[None, :]
    place = out + (t * H * G + member)[:, None] * V + values[None, :]
    o = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    gate = z + t[:, None] * z_token + member[:, None] * V + values[None, :]
    gate = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + values, mask=values < V, other=0.0).to(tl.float32)
    y = normalised_and_gated(o, gate, scale, eps, V, ROWS, BLOCK)
    tl.store(place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_NOT_COMPILED_IN, do_not_specialize_on_alignment=_OF_ANY_ALIGNMENT)
def gated_delta_net_kernel(  # type: ignore[no-untyped-def]
    x, ba, weight, A_log, dt_bias, norm_weight, mixed, out, conv, conv_steps, state, written,
    slots, query_start_loc, accepted, step_rows,
    x_token, x_head, ba_token, ba_head, conv_slot, conv_channel, conv_column,
    conv_row, conv_step, conv_step_channel, conv_step_column, state_slot, written_row, written_step,
    columns, most_tokens, conv_columns, num_tokens, eps,
    CALL: tl.constexpr, IN_STEPS: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    PART: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
    ROWS: tl.constexpr, EPS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One key head of one sequence, with its value heads one after the other.

    A program owns the channels of its q, k and v, so that no other reads inputs that it shifts. It convolves them into
    ``mixed``; goes along the tokens with BLOCK_V rows of a state in registers, as ``recurrent_kernel`` does, whose
    ``step`` it shares, and then with the next rows; and normalises its outputs where they lie. What the operations by
    themselves round between each other is rounded here too.

    Grid: N · H.

    Bytes: of the state, N · HV · V · K elements read and as many written behind every token: 256 KiB a program of the
    published model and decode, beside 8 KiB of projections, outputs and windows; ``mixed`` and what is normalised stay
    in caches. Some rows are under way while other programs of the multiprocessor compute. That takes N · H ≥ 264 on 132
    multiprocessors; below, each program's bytes are served one after the other.

    Args:
        x: [T, H, 2 K + 2 G V], q, k, v and z; ba: [T, H, 2 G]; weight: contiguous [2 H K + H G V, W]; A_log, dt_bias:
            [H G]; norm_weight: [V]; mixed: contiguous [T, H, 2 K + G V], written; out: contiguous [T, H G V].
        conv: [slots, D, conv_columns], conv_steps: [rows, steps, D, W − 1], one dtype.
        state, written, slots, query_start_loc, accepted, step_rows, columns, most_tokens, num_tokens, CALL, IN_STEPS:
            of ``recurrent_kernel``, but that no prefill comes here; the slot of the convolution is that of column 0.
        eps: of the output norm.
    """
    C: tl.constexpr = 2 * K + G * V
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    key_head = tl.program_id(0) % H
    n = (tl.program_id(0) // H).to(tl.int64)

    EVICTION: tl.constexpr = "evict_first" if CALL == DECODE else ""  # as in recurrent_kernel
    wait_for_launch_in_front(OVERLAPS)
    own = tl.load(slots + n * columns).to(tl.int64)
    slot = conv + own * conv_slot
    if CALL == DECODE:
        start, tokens, first, history = n, 1, own, slot
    else:
        start = tl.load(query_start_loc + n).to(tl.int64)
        tokens = (tl.load(query_start_loc + n + 1) - start).to(tl.int32)
        offset = tl.maximum(tl.load(accepted + n).to(tl.int64), 1) - 1
        first = tl.load(slots + n * columns + tl.minimum(offset, columns - 1)).to(tl.int64)
        history = slot + tl.minimum(offset, conv_columns - (W - 1)) * conv_column
    live = first >= 0
    state += first * state_slot + key_head * G * V * K
    known = live & (tokens > 0)
    key = keys_of_part(PART)
    value = tl.arange(0, BLOCK_V)
    there = known & (value < V)[:, None]
    following = load_parts(state + value[:, None] * K, key[None, :], there, K, PART, EVICTION)
    x += start * x_token + key_head * x_head
    ba += start * ba_token + key_head * ba_head
    mixed += (start * H + key_head) * C
    out += (start * H + key_head) * G * V
    if IN_STEPS:
        step_row = tl.load(step_rows + n).to(tl.int64)
        written += step_row * written_row
        convolve_head(
            x, x_token, weight, mixed, H * C, history, conv_steps + step_row * conv_row, conv_channel, conv_column,
            conv_step, conv_step_channel, conv_step_column, tokens, own >= 0, (own >= 0) & (step_row >= 0), most_tokens,
            key_head, CALL, IN_STEPS, H, G, K, V, W, BLOCK_W, BLOCK_C,
        )  # fmt: skip
    else:
        convolve_head(
            x, x_token, weight, mixed, H * C, history, slot, conv_channel, conv_column,
            0, conv_channel, conv_column, tokens, own >= 0, own >= 0, conv_columns,
            key_head, CALL, IN_STEPS, H, G, K, V, W, BLOCK_W, BLOCK_C,
        )  # fmt: skip
    tl.debug_barrier()

    for tile in range(G * BLOCKS):
        member = tile // BLOCKS
        values = tile % BLOCKS * BLOCK_V + value
        has_value = values < V
        there = live & has_value[:, None]
        head = key_head * G + member
        row = head * V * K + values[:, None] * K
        S = cast_parts(following, tl.float32)
        A = tl.load(A_log + head).to(tl.float32)
        bias = tl.load(dt_bias + head).to(tl.float32)
        for t in range(tokens):
            q_t, k_t, v_t, a_t, b_t = load_token(
                t, tokens, mixed, mixed + K, mixed + 2 * K + member * V + values, ba + G + member, ba + member,
                H * C, H * C, H * C, ba_token, ba_token, key, has_value, K, PART,
            )  # fmt: skip
            if IN_STEPS:
                place, kept = written + t * written_step, (t < most_tokens) & (step_row >= 0)
            elif CALL == DECODE:
                place, kept = written + first * state_slot, first >= 0
            else:
                to = tl.load(slots + n * columns + t, mask=t < most_tokens, other=-1).to(tl.int64)
                place, kept = written + to * state_slot, to >= 0
            S, o = step(S, q_t, k_t, v_t, a_t, b_t, A, bias, K, EPS)
            rounded = cast_parts(S, written.dtype.element_ty)
            S = cast_parts(rounded, tl.float32)
            store_parts(place + row, key[None, :], rounded, there & kept, K, PART, EVICTION)
            o = tl.where(live, o, 0.0).to(out.dtype.element_ty)
            tl.store(out + t * (H * G * V) + member * V + values, o, mask=has_value)
        member, values = (tile + 1) // BLOCKS, (tile + 1) % BLOCKS * BLOCK_V + value
        there = known & (member < G) & (values < V)[:, None]
        following = load_parts(state + (member * V + values[:, None]) * K, key[None, :], there, K, PART, EVICTION)
    tl.debug_barrier()

    for first_row in range(0, tokens * G, ROWS):
        normalise_outputs(
            out, x + C, x_token, norm_weight, eps, first_row + tl.arange(0, ROWS), tokens, H, G, V, ROWS, BLOCK
        )
    if CALL == VERIFY:
        behind = (num_tokens - start).to(tl.int32)
        index = tl.arange(0, BLOCK_C)
        for t in range(tl.where(tl.program_id(0) + H >= tl.num_programs(0), tokens, behind), behind):
            tl.store(out + t * (H * G * V) + index, tl.zeros([BLOCK_C], out.dtype.element_ty), mask=index < G * V)


def run_fused(
    qkvz: Tensor,
    ba: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    conv_state: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor | None = None,
    accepted: Tensor | None = None,
    steps: Steps | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Launch :func:`gated_delta_net_kernel`: a verify given ``query_start_loc`` and ``accepted``, else a decode.

    Args:
        qkvz, ba, conv_weight, A_log, dt_bias, norm_weight, eps, conv_state, state, slots [N, columns] or [N],
            query_start_loc, accepted: of the public functions.
        steps: the step pools of the convolution and of the rule, and their rows.
        out: [T, HV · V], contiguous, where the result is written, if anywhere.

    Returns:
        [T, HV · V] in the dtype of ``qkvz``; tokens behind the last sequence have zero outputs.
    """
    expect_contiguous_slots("state", state, 1)
    conv_steps, written, step_rows = (conv_state, state, slots) if steps is None else steps
    if steps is not None:
        expect_contiguous_slots("step_state", written, 2)
    num_tokens, key_heads, _ = qkvz.shape
    value_heads, value_dim, key_dim = state.shape[1:]
    sequences, columns = slots.shape if slots.dim() == 2 else (len(slots), 1)
    if out is None:
        out = torch.empty(num_tokens, value_heads * value_dim, dtype=qkvz.dtype, device=qkvz.device)
    if sequences == 0 or out.numel() == 0:
        return out.zero_()
    qkvz, ba, slots = rows(qkvz), rows(ba), slots.contiguous()
    weights = aligned_rows(conv_weight.contiguous()), *(w.contiguous() for w in (A_log, dt_bias, norm_weight))
    group, width = value_heads // key_heads, conv_weight.shape[1]
    mixed_width = 2 * key_dim + group * value_dim
    mixed = torch.empty(num_tokens, key_heads, mixed_width, dtype=qkvz.dtype, device=qkvz.device)
    config: dict[str, Any] = configuration(key_dim, value_dim)
    with torch.cuda.device_of(qkvz):
        launch(
            gated_delta_net_kernel, (sequences * key_heads,),
            qkvz, ba, *weights, mixed, out, conv_state, conv_steps, state, written, slots,
            slots if query_start_loc is None else query_start_loc.contiguous(),
            slots if accepted is None else accepted.contiguous(),
            step_rows.contiguous(),
            *qkvz.stride()[:2], *ba.stride()[:2], *conv_state.stride(),
            *((0, 0, 0, 0) if steps is None else conv_steps.stride()),
            state.stride(0),
            *((0, 0) if steps is None else written.stride()[:2]),
            columns,
            columns if steps is None else written.shape[1],
            conv_state.shape[2],
            num_tokens,
            eps,
            CALL=(DECODE if query_start_loc is None else VERIFY).value, IN_STEPS=steps is not None,
            H=key_heads, G=group, K=key_dim, V=value_dim, W=width,
            BLOCK_W=power_of_two(width), BLOCK_C=power_of_two(mixed_width),
            EPS=L2_NORM_EPS, enable_fp_fusion=False, **config, **overlapping_here(),
        )  # fmt: skip
    return out


def configuration(key_dim: int, value_dim: int) -> dict[str, int]:
    """Block sizes and warps: from shapes, never from the batch.

    Two programs of 256 threads fill a multiprocessor of NVIDIA's, each with 32 registers of a thread for its rows.
    """
    block = power_of_two(value_dim)
    values = max(8, min(LARGEST_TILE // power_of_two(key_dim), block))
    return {
        "PART": part_of(key_dim), "BLOCK_V": values, "BLOCK": block, "ROWS": 8,
        "num_warps": max(2, values * power_of_two(key_dim) // 1024), "num_stages": 1,
    }  # fmt: skip
