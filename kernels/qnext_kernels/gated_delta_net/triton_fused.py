"""Decode and verify of all that lies between the projections of a Gated DeltaNet layer.

A decode is one launch. A verify are those of the three operations, each of which begins before the one in front has
ended where the GPU can do that: a program that went along the tokens of both, and then of the norm, would wait for
memory three times as long.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.causal_conv1d.triton_conv import convolve, run_verify, taps_of
from qnext_kernels.gated_delta_net.checks import Steps
from qnext_kernels.gated_delta_net.split import split_convolved
from qnext_kernels.gated_delta_rule.reference import L2_NORM_EPS
from qnext_kernels.gated_delta_rule.triton import expect_contiguous_slots
from qnext_kernels.gated_delta_rule.triton_recurrent import run_recurrent
from qnext_kernels.gated_delta_rule.triton_token import (
    cast_parts,
    keys_of_part,
    load_parts,
    load_token,
    part_of,
    step,
    store_parts,
)
from qnext_kernels.gated_norm.triton_norm import normalised_and_gated, run_gated_rms_norm
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_overlap import overlapping_here, wait_for_launch_in_front
from qnext_kernels.triton_support import aligned_rows, power_of_two, rows

LARGEST_TILE = 64 * 128
"""Elements of a state that a program of 256 threads holds in registers: 32 a thread."""
_NOT_COMPILED_IN = ["ba_token", "ba_head", "columns", "eps"]
_OF_ANY_ALIGNMENT = ["ba", "A_log", "dt_bias", "norm_weight", "slots"]


@triton.jit
def convolve_head(  # type: ignore[no-untyped-def]
    x, weight, mixed, window, conv_channel, conv_column, live, key_head,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """q, k and v of a key head and a token: the convolution of ``verify_kernel``, inputs kept as there.

    Args:
        x, mixed: at the head, which has its q, k and v one behind the other.
        window: at the slot, whose first W − 1 columns are the inputs before the token and then those behind the first.
    """
    c = tl.arange(0, BLOCK_C)
    inside = c < 2 * K + G * V
    channel = tl.where(
        c < K, key_head * K + c, tl.where(c < 2 * K, (H - 1 + key_head) * K + c, 2 * (H - 1) * K + key_head * G * V + c)
    )
    arrived = tl.load(x + c, mask=inside & live, other=0.0)
    window += channel.to(tl.int64) * conv_channel
    inputs = []
    for w in tl.static_range(W - 1):
        inputs += [tl.load(window + w * conv_column, mask=inside & live, other=0.0)]
    inputs += [arrived.to(window.dtype.element_ty)]
    taps = taps_of(weight, channel, inside, W, BLOCK_W)
    # What one thread stores, another may have yet to load.
    tl.debug_barrier()
    tl.store(mixed + c, convolve(inputs, arrived, taps, 0, W).to(mixed.dtype.element_ty), mask=inside)
    for w in tl.static_range(W - 1):
        tl.store(window + w * conv_column, inputs[w + 1], mask=inside & live)


@triton.jit
def normalise_outputs(  # type: ignore[no-untyped-def]
    out, z, weight, eps, member, G: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gated RMSNorm of ROWS outputs in place, those of a key head's value heads next to each other."""
    values = tl.arange(0, BLOCK)
    inside = (member < G)[:, None] & (values < V)[None, :]
    at = member[:, None] * V + values[None, :]
    o = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + values, mask=values < V, other=0.0).to(tl.float32)
    y = normalised_and_gated(o, gate, scale, eps, V, ROWS, BLOCK)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_NOT_COMPILED_IN, do_not_specialize_on_alignment=_OF_ANY_ALIGNMENT)
def gated_delta_net_kernel(  # type: ignore[no-untyped-def]
    x, ba, weight, A_log, dt_bias, norm_weight, mixed, out, conv, state, slots,
    x_token, x_head, ba_token, ba_head, conv_slot, conv_channel, conv_column, state_slot, columns, eps,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    PART: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
    ROWS: tl.constexpr, EPS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """The token of one sequence and key head, with its value heads one after the other.

    A program owns the channels of its q, k and v, so that no other reads inputs that it shifts. It convolves them into
    ``mixed``; changes BLOCK_V rows of a state in registers, as ``recurrent_kernel`` does, whose ``step`` it shares, and
    then the next rows; and normalises its outputs where they lie. What the operations by themselves round between each
    other is rounded here too.

    Grid: N · H.

    Bytes: of the state, N · HV · V · K elements read and as many written: 256 KiB a program of the published model,
    beside 8 KiB of projections, outputs and windows; ``mixed`` and what is normalised stay in caches. Some rows are
    under way while other programs of the multiprocessor compute. That takes N · H ≥ 264 on 132 multiprocessors; below,
    each program's bytes are served one after the other.

    Args:
        x: [N, H, 2 K + 2 G V], q, k, v and z; ba: [N, H, 2 G]; weight: contiguous [2 H K + H G V, W]; A_log, dt_bias:
            [H G]; norm_weight: [V]; mixed: contiguous [N, H, 2 K + G V], written; out: contiguous [N, H G V], written.
        conv: [slots, D, at least W − 1]; state: [slots, HV, V, K]; in both those of ``slots`` are changed.
        slots: contiguous [N, columns], of which the first counts.
        eps: of the output norm.
    """
    C: tl.constexpr = 2 * K + G * V
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    key_head = tl.program_id(0) % H
    n = (tl.program_id(0) // H).to(tl.int64)

    wait_for_launch_in_front(OVERLAPS)
    slot = tl.load(slots + n * columns).to(tl.int64)
    live = slot >= 0
    state += slot * state_slot + key_head * G * V * K
    key = keys_of_part(PART)
    value = tl.arange(0, BLOCK_V)
    there = live & (value < V)[:, None]
    following = load_parts(state + value[:, None] * K, key[None, :], there, K, PART)
    x += n * x_token + key_head * x_head
    ba += n * ba_token + key_head * ba_head
    mixed += (n * H + key_head) * C
    out += (n * H + key_head) * G * V
    convolve_head(
        x, weight, mixed, conv + slot * conv_slot, conv_channel, conv_column, live, key_head,
        H, G, K, V, W, BLOCK_W, BLOCK_C,
    )  # fmt: skip
    tl.debug_barrier()

    for tile in range(G * BLOCKS):
        member = tile // BLOCKS
        values = tile % BLOCKS * BLOCK_V + value
        has_value = values < V
        head = key_head * G + member
        S = cast_parts(following, tl.float32)
        A = tl.load(A_log + head).to(tl.float32)
        bias = tl.load(dt_bias + head).to(tl.float32)
        q, k, v, a, b = load_token(
            0, 1, mixed, mixed + K, mixed + 2 * K + member * V + values, ba + G + member, ba + member,
            0, 0, 0, 0, 0, key, has_value, K, PART,
        )  # fmt: skip
        S, o = step(S, q, k, v, a, b, A, bias, K, EPS)
        place = state + (member * V + values[:, None]) * K
        rounded = cast_parts(S, state.dtype.element_ty)
        store_parts(place, key[None, :], rounded, live & has_value[:, None], K, PART)
        o = tl.where(live, o, 0.0).to(out.dtype.element_ty)
        tl.store(out + member * V + values, o, mask=has_value)
        member, values = (tile + 1) // BLOCKS, (tile + 1) % BLOCKS * BLOCK_V + value
        there = live & (member < G) & (values < V)[:, None]
        place = state + (member * V + values[:, None]) * K
        following = load_parts(place, key[None, :], there, K, PART)
    tl.debug_barrier()

    for first in range(0, G, ROWS):
        normalise_outputs(out, x + C, norm_weight, eps, first + tl.arange(0, ROWS), G, V, ROWS, BLOCK)


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
    """Launch :func:`gated_delta_net_kernel`, or given ``query_start_loc`` and ``accepted`` :func:`run_operations`.

    Args:
        qkvz, ba, conv_weight, A_log, dt_bias, norm_weight, eps, conv_state, state, slots [N, columns] or [N],
            query_start_loc, accepted: of the public functions.
        steps: the step pools of the convolution and of the rule, and their rows.
        out: [T, HV · V], contiguous, where the result is written, if anywhere.

    Returns:
        [T, HV · V] in the dtype of ``qkvz``; tokens behind the last sequence have zero outputs.
    """
    expect_contiguous_slots("state", state, 1)
    if steps is not None:
        expect_contiguous_slots("step_state", steps[1], 2)
    num_tokens, key_heads, _ = qkvz.shape
    value_heads, value_dim, key_dim = state.shape[1:]
    if out is None:
        out = torch.empty(num_tokens, value_heads * value_dim, dtype=qkvz.dtype, device=qkvz.device)
    sequences, columns = slots.shape if slots.dim() == 2 else (len(slots), 1)
    if sequences == 0 or out.numel() == 0:
        return out.zero_()
    qkvz, ba, slots = rows(qkvz), rows(ba), slots.contiguous()
    A_log, dt_bias = A_log.contiguous(), dt_bias.contiguous()
    group, width = value_heads // key_heads, conv_weight.shape[1]
    mixed_width = 2 * key_dim + group * value_dim
    mixed = torch.empty(num_tokens, key_heads * mixed_width, dtype=qkvz.dtype, device=qkvz.device)
    with torch.cuda.device_of(qkvz):
        if query_start_loc is not None and accepted is not None:
            run_operations(
                qkvz, ba, conv_weight, A_log, dt_bias, norm_weight, eps, conv_state, state, slots,
                query_start_loc.contiguous(), accepted.contiguous(), steps, mixed, out,
            )  # fmt: skip
            return out
        config: dict[str, Any] = configuration(key_dim, value_dim)
        launch(
            gated_delta_net_kernel, (sequences * key_heads,),
            qkvz, ba, aligned_rows(conv_weight.contiguous()), A_log, dt_bias, norm_weight.contiguous(), mixed, out,
            conv_state, state, slots,
            *qkvz.stride()[:2], *ba.stride()[:2], *conv_state.stride(), state.stride(0), columns, eps,
            H=key_heads, G=group, K=key_dim, V=value_dim, W=width,
            BLOCK_W=power_of_two(width), BLOCK_C=power_of_two(mixed_width), EPS=L2_NORM_EPS, enable_fp_fusion=False,
            **config, **overlapping_here(),
        )  # fmt: skip
    return out


def run_operations(
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
    query_start_loc: Tensor,
    accepted: Tensor,
    steps: Steps | None,
    mixed: Tensor,
    out: Tensor,
) -> None:
    """Launch the kernels of a verify of all three operations, on the projections as they lie.

    Args:
        as of :func:`run_fused`, but contiguous where that makes them so; mixed: [T, 2 H K + HV V], contiguous, written.
    """
    num_tokens, key_heads, _ = qkvz.shape
    _, value_heads, value_dim, key_dim = state.shape
    group = value_heads // key_heads
    grouped_qkv, z = qkvz.split_with_sizes([2 * key_dim + group * value_dim, group * value_dim], 2)
    b, a = ba.split_with_sizes([group, group], 2)
    of_conv = of_rule = None
    if steps is not None:
        step_rows = steps[2].contiguous()
        of_conv, of_rule = (steps[0], step_rows), (steps[1], step_rows)
    offsets = query_start_loc, accepted
    run_verify(grouped_qkv, conv_weight, mixed, conv_state, slots[:, 0], *offsets, of_conv, key_dim)
    tokens = *split_convolved(mixed, state), a, b, A_log, dt_bias
    run_recurrent(tokens, out.view(num_tokens, value_heads, value_dim), state, slots, *offsets, of_rule)
    o = out.view(num_tokens, key_heads, group, value_dim)
    run_gated_rms_norm(o, z.view(num_tokens, key_heads, group, value_dim), norm_weight, eps, o)


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
