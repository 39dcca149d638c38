"""Decode and verify of all that lies between the projections of a Gated DeltaNet layer, in one launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.gated_delta_net.checks import Steps
from qnext_kernels.gated_delta_rule.reference import L2_NORM_EPS
from qnext_kernels.gated_delta_rule.triton import expect_contiguous_slots
from qnext_kernels.gated_delta_rule.triton_math import inverse_norms, log_decay, recurrence, write_strength
from qnext_kernels.gated_norm.triton_norm import normalised_and_gated
from qnext_kernels.triton_elementwise import silu
from qnext_kernels.triton_support import Target, current_target, power_of_two, rows

LARGEST_BLOCK = 128
"""The registers of a program hold a state of so many values and keys."""
# One kernel for decode and verify, in any layout: what differs between calls is not compiled in.
_NOT_COMPILED_IN = [
    "x_token", "x_head", "ba_token", "ba_head", "conv_slot", "conv_channel", "conv_column",
    "conv_row", "conv_step", "conv_step_channel", "conv_step_column",
    "columns", "most_tokens", "conv_columns", "call", "in_steps", "eps",
]  # fmt: skip
_OF_ANY_ALIGNMENT = [
    "x", "ba", "weight", "A_log", "dt_bias", "norm_weight", "out", "conv", "conv_steps",
    "slots", "query_start_loc", "accepted", "step_rows",
]  # fmt: skip


@triton.jit
def convolved(  # type: ignore[no-untyped-def]
    x, x_token, weight, history, conv_column, t, live, inside, channels, conv_channel, W: tl.constexpr
):  # fmt: skip
    """SiLU of the convolution of token t of a sequence, rounded to the dtype of ``x``; 0 where not ``live``.

    Args:
        x: at the channels of token 0 of the sequence; ``weight``: [D, W]; ``history``: at the first of the W − 1 inputs
            before token 0, in the dtype that the pool rounds inputs to.
        channels: in ``weight`` and in the pool.
    """
    total = tl.full(channels.shape, -0.0, tl.float32)
    for age in tl.static_range(W - 1, 0, -1):
        tap = tl.load(weight + channels * W + W - 1 - age, mask=inside, other=0.0).to(tl.float32)
        place = history + channels * conv_channel + (t + W - 1 - age) * conv_column
        kept = tl.load(place, mask=inside & live & (t < age), other=0.0)
        token = tl.load(x + (t - age) * x_token, mask=inside & (t >= age), other=0.0).to(kept.dtype)
        total = tl.fma(tl.where(t < age, kept, token).to(tl.float32), tap, total)
    tap = tl.load(weight + channels * W + W - 1, mask=inside, other=0.0).to(tl.float32)
    total = tl.fma(tl.load(x + t * x_token, mask=inside, other=0.0).to(tl.float32), tap, total)
    y = silu(total).to(x.dtype.scalar.element_ty)
    return tl.where(live, y.to(tl.float32), 0.0)


@triton.jit
def window(  # type: ignore[no-untyped-def]
    x, x_token, history, conv_column, first, count, live, inside, channels, conv_channel,
    W: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Inputs ``first`` to ``first + count − 1`` of a sequence, of which the W − 1 first are its history.

    Returns:
        [channels, BLOCK_W] in the dtype of the pool.
    """
    column = first + tl.arange(0, BLOCK_W)[None, :]
    wanted = inside[:, None] & live & (column < first + count)
    place = history + channels[:, None] * conv_channel + column * conv_column
    kept = tl.load(place, mask=wanted & (column < W - 1), other=0.0)
    row = column - (W - 1)
    token = tl.load(x[:, None] + row * x_token, mask=wanted & (row >= 0), other=0.0)
    return tl.where(row < 0, kept, token.to(kept.dtype))


@triton.jit
def keep_inputs(  # type: ignore[no-untyped-def]
    x, x_token, history, conv_column, tokens, live, inside, channels, conv_channel,
    target, kept_columns, steps, conv_step, conv_step_channel, conv_step_column, step_live, most_tokens,
    W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Leave the inputs of some channels in the slot, for any number of accepted tokens, or in the step pool.

    All threads read the old window before one writes the new.
    """
    new = window(
        x, x_token, history, conv_column, 1, kept_columns, live, inside, channels, conv_channel, W, BLOCK_COLUMNS
    )
    tl.debug_barrier()
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    slot = target + channels[:, None] * conv_channel + column * conv_column
    tl.store(slot, new, mask=inside[:, None] & live & (column < kept_columns))
    column = tl.arange(0, BLOCK_W)[None, :]
    for t in range(tl.where(step_live, tl.minimum(tokens, most_tokens), 0)):
        step = window(x, x_token, history, conv_column, t + 1, W - 1, live, inside, channels, conv_channel, W, BLOCK_W)
        place = steps + t * conv_step + channels[:, None] * conv_step_channel + column * conv_step_column
        tl.store(place, step, mask=inside[:, None] & (column < W - 1))


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
    x, ba, weight, A_log, dt_bias, norm_weight, out, conv, conv_steps, state, written,
    slots, query_start_loc, accepted, step_rows,
    x_token, x_head, ba_token, ba_head, conv_slot, conv_channel, conv_column,
    conv_row, conv_step, conv_step_channel, conv_step_column, state_slot, written_row, written_step,
    columns, most_tokens, conv_columns, call, in_steps, eps,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """One key head of one sequence, with its value heads one after the other.

    A program owns the channels of its q, k and v, so that no other reads inputs that it shifts. The state of a value
    head stays in registers over the tokens, as in ``recurrent_kernel``, whose recurrence it shares; what the operations
    by themselves round between each other is rounded here too.

    Grid: N · H.

    Bytes: of the state, N · HV · V · K elements read and as many written behind every token: 256 KiB a program of the
    published model and decode, beside 8 KiB of projections, outputs and windows. A program holds one value head's
    state, 64 KiB, in registers, and a multiprocessor two programs: one computes while the other's state is under way.
    That takes N · H ≥ 264 on 132 multiprocessors; below, each program's bytes are served one after the other.

    Args:
        x: [T, H, 2 K + 2 G V], q, k, v and z; ba: [T, H, 2 G]; weight: contiguous [2 H K + H G V, W]; A_log, dt_bias:
            [H G]; norm_weight: [V]; out: contiguous [T, H G V].
        conv: [slots, D, conv_columns], conv_steps: [rows, steps, D, W − 1], one dtype.
        state, written, slots, query_start_loc, accepted, step_rows, columns, most_tokens, in_steps: of
            ``recurrent_kernel``; the slot of the convolution is that of column 0.
        call: 0, decode: sequence n is token n and starts from column 0; 1, verify.
        eps: of the output norm.
    """
    key_head = tl.program_id(0) % H
    n = (tl.program_id(0) // H).to(tl.int64)
    index = tl.arange(0, BLOCK)
    tile = index[:, None] * K + index[None, :]
    inside = (index[:, None] < V) & (index[None, :] < K)

    verify = call != 0
    start = tl.where(verify, tl.load(query_start_loc + n, mask=verify, other=0).to(tl.int64), n)
    end = tl.where(verify, tl.load(query_start_loc + n + 1, mask=verify, other=0).to(tl.int64), n + 1)
    tokens = (end - start).to(tl.int32)
    taken = tl.load(accepted + n, mask=verify, other=1).to(tl.int64)
    first = tl.load(slots + n * columns + tl.minimum(tl.maximum(taken, 1), columns) - 1).to(tl.int64)
    live = first >= 0
    to_steps = in_steps != 0
    step_row = tl.load(step_rows + n, mask=to_steps, other=-1).to(tl.int64)

    # Of the convolution: where its history begins, and how many columns of the slot are written.
    own = tl.load(slots + n * columns).to(tl.int64)
    conv_live = own >= 0
    taken = tl.minimum(tl.maximum(taken, 1), conv_columns - W + 2)
    slot = conv + own * conv_slot
    history = slot + (taken - 1) * conv_column
    kept = tl.where(to_steps | (tokens == 0), 0, tl.minimum(tokens + W - 2, conv_columns)).to(tl.int32)
    steps = conv_steps + step_row * conv_row
    step_live = conv_live & to_steps & (step_row >= 0)

    # q, k and v of a value head side by side: a channel is one thread's, who convolves and keeps it.
    channel = tl.arange(0, 4 * BLOCK)
    kind = channel // BLOCK
    within = channel % BLOCK
    row = tl.arange(0, 4)
    x_n = x + start * x_token + key_head * x_head
    # What is hoisted out of these loops would have to be spilled.
    for member in tl.range(G, disable_licm=True):
        head = key_head * G + member
        place = state + first * state_slot + head * V * K + tile
        S = tl.load(place, mask=inside & live & (tokens > 0), other=0.0).to(tl.float32)
        A = tl.load(A_log + head).to(tl.float32)
        bias = tl.load(dt_bias + head).to(tl.float32)
        x_c = x_n + tl.where(kind == 2, 2 * K + member * V, kind * K) + within
        channels = tl.where(kind == 2, 2 * H * K + head * V, (kind * H + key_head) * K) + within
        exists = (kind < 3) & (within < tl.where(kind == 2, V, K))
        for t in tl.range(tokens, disable_licm=True):
            gate = ba + (start + t) * ba_token + key_head * ba_head + member
            beta = write_strength(tl.load(gate).to(tl.float32))
            g = log_decay(tl.load(gate + G).to(tl.float32), A, bias)
            y = convolved(x_c, x_token, weight, history, conv_column, t, conv_live, exists, channels, conv_channel, W)
            y = tl.reshape(y, [4, BLOCK])
            factor = inverse_norms(y, 4, BLOCK, EPS)
            factor = tl.where(row == 0, factor * (K**-0.5), tl.where(row == 1, factor, 1.0))
            y = tl.permute(tl.reshape(y * factor[:, None], [2, 2, BLOCK]), (2, 1, 0))
            qk, v_t = tl.split(y)
            q_t, k_t = tl.split(qk)
            v_t, _ = tl.split(v_t)
            S, o = recurrence(S, q_t, k_t, v_t, g, beta)
            o = tl.where(live, o, 0.0).to(out.dtype.element_ty)
            tl.store(out + ((start + t) * H * G + head) * V + index, o, mask=index < V)

            rounded = S.to(written.dtype.element_ty)
            S = rounded.to(tl.float32)
            has_place = t < most_tokens
            in_slot = has_place & (to_steps == 0)
            to_slot = tl.load(slots + n * columns + t, mask=in_slot, other=-1).to(tl.int64)
            target = tl.where(to_steps, step_row, to_slot)
            offset = tl.where(to_steps, step_row * written_row + t * written_step, to_slot * state_slot)
            place = written + offset + head * V * K + tile
            tl.store(place, rounded, mask=inside & live & has_place & (target >= 0))
    tl.debug_barrier()
    for first_row in range(0, tokens * G, ROWS):
        normalise_outputs(
            out + (start * H + key_head) * G * V, x_n + 2 * K + G * V, x_token, norm_weight, eps,
            first_row + tl.arange(0, ROWS), tokens, H, G, V, ROWS, BLOCK,
        )  # fmt: skip
    for part in range(2 + G):
        of_value = part >= 2
        keep_inputs(
            x_n + tl.where(of_value, 2 * K + (part - 2) * V, part * K) + index, x_token, history, conv_column, tokens,
            conv_live, index < tl.where(of_value, V, K),
            tl.where(of_value, 2 * H * K + (key_head * G + part - 2) * V, (part * H + key_head) * K) + index,
            conv_channel, slot, kept, steps, conv_step, conv_step_channel, conv_step_column, step_live, most_tokens,
            W, BLOCK_W, BLOCK_COLUMNS,
        )  # fmt: skip


def fits(key_dim: int, value_dim: int) -> bool:
    """Whether the kernel serves these dimensions: one block size for both, and registers for the state of a head."""
    return power_of_two(key_dim) == power_of_two(value_dim) <= LARGEST_BLOCK


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
        qkvz, ba, conv_weight, A_log, dt_bias, norm_weight, eps, conv_state, state, slots [N, columns], query_start_loc,
            accepted: of the public functions.
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
    sequences, columns = slots.shape
    if out is None:
        out = torch.empty(num_tokens, value_heads * value_dim, dtype=qkvz.dtype, device=qkvz.device)
    if query_start_loc is not None:
        out.zero_()  # A graph of a verify may hold tokens behind the last sequence.
    if sequences == 0 or out.numel() == 0:
        return out
    qkvz, ba, slots = rows(qkvz), rows(ba), slots.contiguous()
    weights = conv_weight.contiguous(), A_log.contiguous(), dt_bias.contiguous(), norm_weight.contiguous()
    width = conv_weight.shape[1]
    config: dict[str, Any] = configuration(key_dim, current_target())
    with torch.cuda.device_of(qkvz):
        gated_delta_net_kernel[(sequences * key_heads,)](
            qkvz, ba, *weights, out, conv_state, conv_steps, state, written, slots,
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
            int(query_start_loc is not None),
            int(steps is not None),
            eps,
            H=key_heads, G=value_heads // key_heads, K=key_dim, V=value_dim, W=width,
            BLOCK_W=power_of_two(width - 1), BLOCK_COLUMNS=power_of_two(conv_state.shape[2]),
            EPS=L2_NORM_EPS, enable_fp_fusion=False, **config,
        )  # fmt: skip
    return out


def configuration(key_dim: int, target: Target) -> dict[str, int]:
    """Block sizes and warps: from shapes and target, never from the batch.

    The state takes 64 registers of each thread, and two programs of 128 a thread fill a multiprocessor of NVIDIA's; the
    compiler would take more to no end.
    """
    block = power_of_two(key_dim)
    config = {"BLOCK": block, "ROWS": 8, "num_warps": max(1, block // 16), "num_stages": 1}
    return config | {"maxnreg": 128} if target.nvidia else config
