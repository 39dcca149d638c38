"""Token by token: decode, verify and the last few tokens of a prefill, in one launch for any number of sequences."""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.gated_delta_rule.cpu import RECURRENT_TOKENS
from qnext_kernels.gated_delta_rule.reference import CHUNK_SIZE, L2_NORM_EPS
from qnext_kernels.gated_delta_rule.triton_token import (
    cast_parts,
    keys_of_part,
    load_parts,
    load_token,
    part_of,
    step,
    store_parts,
)
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_overlap import overlapping_here, wait_for_launch_in_front
from qnext_kernels.triton_support import ceil_div, power_of_two

DECODE, VERIFY, TAIL = map(tl.constexpr, range(3))
"""What a launch runs: sequence n is token n; all tokens of ragged sequences; what chunks leave of a prefill."""
_NOT_COMPILED_IN = [
    "v_token", "v_head", "a_token", "a_head", "b_token", "b_head", "columns", "most_tokens", "num_tokens",
]  # fmt: skip
_OF_ANY_ALIGNMENT = [
    "v", "a", "b", "A_log", "dt_bias", "out", "slots", "query_start_loc", "accepted", "has_initial", "step_rows",
]  # fmt: skip


@triton.jit(do_not_specialize=_NOT_COMPILED_IN, do_not_specialize_on_alignment=_OF_ANY_ALIGNMENT)
def recurrent_kernel(  # type: ignore[no-untyped-def]
    q, k, v, a, b, A_log, dt_bias, out, state, written, slots, query_start_loc, accepted, has_initial, step_rows,
    q_token, q_head, k_token, k_head, v_token, v_head, a_token, a_head, b_token, b_head,
    state_slot, written_row, written_step, columns, most_tokens, num_tokens,
    CALL: tl.constexpr, IN_STEPS: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    PART: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, SHORT: tl.constexpr, EPS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Some rows of the state of one value head of one sequence, over its tokens.

    The recurrence of Gated Delta Networks (arXiv 2412.06464, equation 10) for BLOCK_V rows of S [V, K]:

        S ← exp(g_t) S;   S ← S + β_t (v_t − S k_t) ⊗ k_t;   o_t = S q_t

    with g and β from a, b, A_log and dt_bias, and with k and q L2-normalised here. Rows of S do not need each other:
    they stay in registers from the first token to the last and go to memory behind every token, rounded to the dtype of
    the pool. The next token continues from what was rounded, and is under way from memory meanwhile.

    Grid: N · HV · ceil(V / BLOCK_V), the blocks of one head next to each other; it depends on shapes alone.

    Bytes: of the state, N · HV · V · K elements read and as many written behind every token; q, k, v and out are less
    than a hundredth of that. Operations: 7 a state element and token, about one a byte. What keeps memory busy are few
    instructions a row and many small programs: a decode takes 600 of a warp for 8 rows, 78 registers of a thread. A
    program is one warp, which waits for no other behind every token.

    Args:
        q, k: [T, H, K]; v: [T, HV, V]; a, b: [T, H, HV / H]; A_log, dt_bias: [HV]; out: contiguous [T, HV, V].
        state: [slots, HV, V, K], read; a slot is ``state_slot`` elements from the next.
        written: the pool that states are written to: ``state``, or the step pool [rows, steps, HV, V, K].
        slots: contiguous [N, columns]; query_start_loc: [N + 1]; accepted, has_initial, step_rows: [N].
        most_tokens: columns or steps that there are; behind further tokens no state is written.
        num_tokens: T; what a verify has behind its last sequence gets zero outputs.
        CALL: DECODE: sequence n is token n and starts from column 0, query_start_loc is not read; VERIFY; TAIL: the
            last chunk of a prefill where it has at most SHORT tokens, from zero where no state is before it. The state
            behind token t goes to ``slots[n, t]``, in a prefill always to ``slots[n, 0]``.
        IN_STEPS: the state behind token t of a verify goes to ``written[step_rows[n], t]`` instead.
    """
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    head = (program // BLOCKS) % HV
    n = (program // (BLOCKS * HV)).to(tl.int64)
    values = (program % BLOCKS) * BLOCK_V + tl.arange(0, BLOCK_V)
    has_value = values < V
    rows = has_value[:, None]
    key = keys_of_part(PART)
    tile = head * V * K + values[:, None] * K
    key_head = head // (HV // H)

    wait_for_launch_in_front(OVERLAPS)
    A = tl.load(A_log + head).to(tl.float32)
    bias = tl.load(dt_bias + head).to(tl.float32)
    known = n >= 0
    if CALL == DECODE:
        first = tl.load(slots + n * columns).to(tl.int64)
        start, end, count = n, n + 1, 1
    else:
        start = tl.load(query_start_loc + n).to(tl.int64)
        end = tl.load(query_start_loc + n + 1).to(tl.int64)
        if CALL == TAIL:
            first = tl.load(slots + n * columns).to(tl.int64)
            last_chunk = (end - start) % C
            known = (last_chunk < end - start) | (tl.load(has_initial + n) != 0)
            start = tl.where(last_chunk <= SHORT, end - last_chunk, end)
        else:
            taken = tl.load(accepted + n).to(tl.int64)
            first = tl.load(slots + n * columns + tl.minimum(tl.maximum(taken, 1), columns) - 1).to(tl.int64)
        known = known & (start < end)
        count = (end - start).to(tl.int32)
    live = first >= 0
    S = load_parts(state + first * state_slot + tile, key[None, :], known & live & rows, K, PART)
    S = cast_parts(S, tl.float32)
    if IN_STEPS:
        step_row = tl.load(step_rows + n).to(tl.int64)
        written += step_row * written_row

    q += key_head * q_head
    k += key_head * k_head
    v += head * v_head + values
    a += key_head * a_head + head % (HV // H)
    b += key_head * b_head + head % (HV // H)
    out += head * V + values
    q_0, k_0, v_0, a_0, b_0 = load_token(
        start, end, q, k, v, a, b, q_token, k_token, v_token, a_token, b_token, key, has_value, K, PART
    )
    for t in range(count):
        token = start + t
        if CALL != DECODE:
            q_1, k_1, v_1, a_1, b_1 = load_token(
                token + 1, end, q, k, v, a, b, q_token, k_token, v_token, a_token, b_token, key, has_value, K, PART
            )
        if IN_STEPS:
            place, kept = written + (token - start) * written_step, live & (t < most_tokens) & (step_row >= 0)
        elif CALL == VERIFY:
            slot = tl.load(slots + n * columns + t, mask=t < most_tokens, other=-1).to(tl.int64)
            place, kept = written + slot * state_slot, live & (slot >= 0)
        else:
            place, kept = written + first * state_slot, live
        S, o = step(S, q_0, k_0, v_0, a_0, b_0, A, bias, K, EPS)
        rounded = cast_parts(S, written.dtype.element_ty)
        S = cast_parts(rounded, tl.float32)
        store_parts(place + tile, key[None, :], rounded, kept & rows, K, PART)
        o = tl.where(live, o, 0.0).to(out.dtype.element_ty)
        tl.store(out + token * (HV * V), o, mask=has_value)
        if CALL != DECODE:
            q_0, k_0, v_0, a_0, b_0 = q_1, k_1, v_1, a_1, b_1

    if CALL == VERIFY:
        behind = num_tokens.to(tl.int64)
        for token in range(tl.where(program + BLOCKS * HV >= tl.num_programs(0), end, behind), behind):
            tl.store(out + token * (HV * V), tl.zeros([BLOCK_V], out.dtype.element_ty), mask=has_value)


@cache
def configuration(key_dim: int, value_dim: int) -> dict[str, int]:
    """Block sizes and warps: from shapes, never from the batch, so that a sequence has the same bits in any batch."""
    return {"PART": part_of(key_dim), "BLOCK_V": min(8, power_of_two(value_dim)), "num_warps": 1, "num_stages": 1}


def run_recurrent(
    tokens: tuple[Tensor, ...],
    out: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor | None = None,
    accepted: Tensor | None = None,
    steps: tuple[Tensor, Tensor] | None = None,
    has_initial: Tensor | None = None,
) -> None:
    """Launch :func:`recurrent_kernel`: a verify given ``accepted``, a tail given ``has_initial``, else a decode.

    Args:
        tokens: q, k, v (rows of unit stride), a, b (so too; [T, HV] or [T, H, HV / H]), A_log and dt_bias (contiguous).
        out: [T, HV, V], written.
        state, slots [N, columns] or [N], query_start_loc, accepted, steps, has_initial: of the public functions,
            indices and flags contiguous.
    """
    q, k, v, a, b, A_log, dt_bias = tokens
    value_heads, value_dim = v.shape[1:]
    key_heads, key_dim = q.shape[1:]
    group = value_heads // key_heads
    sequences, columns = slots.shape if slots.dim() == 2 else (len(slots), 1)
    written, step_rows = (state, slots) if steps is None else steps
    config: dict[str, Any] = configuration(key_dim, value_dim)
    if sequences == 0 or out.numel() == 0:
        out.zero_()
        return
    launch(
        recurrent_kernel, (sequences * value_heads * ceil_div(value_dim, config["BLOCK_V"]),),
        q, k, v, a, b, A_log, dt_bias, out, state, written, slots,
        slots if query_start_loc is None else query_start_loc,
        slots if accepted is None else accepted,
        slots if has_initial is None else has_initial,
        step_rows,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *strides_of_gates(a, group), *strides_of_gates(b, group),
        state.stride(0),
        0 if steps is None else written.stride(0),
        0 if steps is None else written.stride(1),
        columns,
        columns if steps is None else written.shape[1],
        out.shape[0],
        CALL=(DECODE if query_start_loc is None else TAIL if accepted is None else VERIFY).value,
        IN_STEPS=steps is not None,
        H=key_heads, HV=value_heads, K=key_dim, V=value_dim, C=CHUNK_SIZE, SHORT=RECURRENT_TOKENS, EPS=L2_NORM_EPS,
        enable_fp_fusion=False,
        **config,
        **overlapping_here(),
    )  # fmt: skip


def strides_of_gates(x: Tensor, group: int) -> tuple[int, int]:
    """Between tokens, and between the ``group`` value heads of one key head and those of the next."""
    token, head, *_ = x.stride()
    return (token, head) if x.dim() == 3 else (token, group)
