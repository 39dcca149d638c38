"""Token by token: decode, verify and the last few tokens of a prefill, in one launch for any number of sequences."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.gated_delta_rule.cpu import RECURRENT_TOKENS
from qnext_kernels.gated_delta_rule.reference import CHUNK_SIZE, L2_NORM_EPS
from qnext_kernels.gated_delta_rule.triton_math import step
from qnext_kernels.triton_support import power_of_two

DECODE, VERIFY, TAIL = range(3)
"""What a launch runs: sequence n is token n; all tokens of ragged sequences; what chunks leave of a prefill."""
# What differs between those calls is not compiled into the kernel, so that they run the same instructions.
_NOT_COMPILED_IN = [
    "q_token", "q_head", "k_token", "k_head", "v_token", "v_head", "a_token", "b_token",
    "columns", "most_tokens", "call", "in_steps",
]  # fmt: skip
_OF_ANY_ALIGNMENT = [
    "q", "k", "v", "a", "b", "A_log", "dt_bias", "out",
    "slots", "query_start_loc", "accepted", "has_initial", "step_rows",
]  # fmt: skip


@triton.jit(do_not_specialize=_NOT_COMPILED_IN, do_not_specialize_on_alignment=_OF_ANY_ALIGNMENT)
def recurrent_kernel(  # type: ignore[no-untyped-def]
    q, k, v, a, b, A_log, dt_bias, out, state, written, slots, query_start_loc, accepted, has_initial, step_rows,
    q_token, q_head, k_token, k_head, v_token, v_head, a_token, b_token, state_slot, written_row, written_step,
    columns, most_tokens, call, in_steps,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    C: tl.constexpr, SHORT: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Some rows of the state of one value head of one sequence, over its tokens.

    The recurrence of Gated Delta Networks (arXiv 2412.06464, equation 10) for BLOCK_V rows of S [V, K]:

        S ← exp(g_t) S;   S ← S + β_t (v_t − S k_t) ⊗ k_t;   o_t = S q_t

    with g and β from a, b, A_log and dt_bias, and with k and q L2-normalised here. Rows of S do not need each other:
    they stay in registers from the first token to the last and go to memory behind every token, rounded to the dtype of
    the pool. The next token continues from what was rounded.

    Grid: N · HV · ceil(V / BLOCK_V), the blocks of one head next to each other; it depends on shapes alone.

    Bytes: of the state, N · HV · V · K elements read and as many written behind every token; q, k, v and out are less
    than a hundredth of that. Operations: 7 a state element and token, about one a byte: memory is the limit.

    Args:
        q, k: [T, H, K]; v: [T, HV, V]; a, b: [T, HV]; A_log, dt_bias: [HV]; out: contiguous [T, HV, V].
        state: [slots, HV, V, K], read; a slot is ``state_slot`` elements from the next.
        written: the pool that states are written to: ``state``, or the step pool [rows, steps, HV, V, K].
        slots: contiguous [N, columns]; query_start_loc: [N + 1]; accepted, has_initial, step_rows: [N].
        most_tokens: columns or steps that there are; behind further tokens no state is written.
        call: 0, decode: sequence n is token n and starts from column 0, query_start_loc is not read; 1, verify; 2,
            tail: the last chunk of a prefill where it has at most SHORT tokens, from zero where no state is before it.
            The state behind token t goes to ``slots[n, t]``, in a prefill always to ``slots[n, 0]``.
        in_steps: not 0: the state behind token t goes to ``written[step_rows[n], t]`` instead.
    """
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    head = (program // BLOCKS) % HV
    n = (program // (BLOCKS * HV)).to(tl.int64)
    values = (program % BLOCKS) * BLOCK_V + tl.arange(0, BLOCK_V)
    keys = tl.arange(0, BLOCK_K)
    inside = (values[:, None] < V) & (keys[None, :] < K)
    tile = head * V * K + values[:, None] * K + keys[None, :]
    key_head = head // (HV // H)

    ragged, verify, tail = call != 0, call == 1, call == 2
    start = tl.where(ragged, tl.load(query_start_loc + n, mask=ragged, other=0).to(tl.int64), n)
    end = tl.where(ragged, tl.load(query_start_loc + n + 1, mask=ragged, other=0).to(tl.int64), n + 1)
    last_chunk = (end - start) % C
    from_zero = tail & (last_chunk == end - start) & (tl.load(has_initial + n, mask=tail, other=1) == 0)
    start = tl.where(tail, tl.where(last_chunk <= SHORT, end - last_chunk, end), start)

    taken = tl.load(accepted + n, mask=verify, other=1).to(tl.int64)
    column = tl.minimum(tl.maximum(taken, 1), columns) - 1
    first = tl.load(slots + n * columns + column).to(tl.int64)
    live = first >= 0
    known = live & (start < end) & (from_zero == 0)
    S = tl.load(state + first * state_slot + tile, mask=inside & known, other=0.0).to(tl.float32)

    to_steps = in_steps != 0
    step_row = tl.load(step_rows + n, mask=to_steps, other=-1).to(tl.int64)
    A = tl.load(A_log + head).to(tl.float32)
    bias = tl.load(dt_bias + head).to(tl.float32)
    for t in range((end - start).to(tl.int32)):
        token = start + t
        q_t = tl.load(q + token * q_token + key_head * q_head + keys, mask=keys < K, other=0.0)
        k_t = tl.load(k + token * k_token + key_head * k_head + keys, mask=keys < K, other=0.0)
        v_t = tl.load(v + token * v_token + head * v_head + values, mask=values < V, other=0.0)
        a_t, b_t = tl.load(a + token * a_token + head), tl.load(b + token * b_token + head)
        S, o = step(S, q_t, k_t, v_t, a_t, b_t, A, bias, K, BLOCK_K, EPS)
        o = tl.where(live, o, 0.0)
        tl.store(out + (token * HV + head) * V + values, o.to(out.dtype.element_ty), mask=values < V)

        rounded = S.to(written.dtype.element_ty)
        S = rounded.to(tl.float32)
        has_place = tail | (t < most_tokens)
        own = has_place & (tail == 0) & (to_steps == 0)
        slot = tl.where(tail, first, tl.load(slots + n * columns + t, mask=own, other=-1).to(tl.int64))
        target = tl.where(to_steps, step_row, slot)
        place = tl.where(to_steps, step_row * written_row + t * written_step, slot * state_slot)
        tl.store(written + place + tile, rounded, mask=inside & live & has_place & (target >= 0))


def configuration(value_heads: int, key_dim: int, value_dim: int) -> dict[str, int]:
    """Block sizes and warps: from shapes, never from the batch, so that a sequence has the same bits in any batch.

    One sequence should give every multiprocessor a program, which takes small blocks where tensor parallelism leaves
    few heads; 32 rows of 128 keys hide the latency of memory. One warp for eight rows is 32 registers a thread.
    """
    block_v = min(32, max(8, power_of_two(value_heads * value_dim // 128)), power_of_two(value_dim))
    return {
        "BLOCK_K": power_of_two(key_dim),
        "BLOCK_V": block_v,
        "num_warps": max(1, block_v // 8),
        "num_stages": 1,
    }


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
        tokens: q, k, v, a, b (rows of unit stride), A_log and dt_bias (contiguous).
        out: [T, HV, V], written.
        state, slots [N, columns], query_start_loc, accepted, steps, has_initial: of the public functions, indices and
            flags contiguous.
    """
    q, k, v, a, b, A_log, dt_bias = tokens
    value_heads, value_dim = v.shape[1:]
    key_heads, key_dim = q.shape[1:]
    sequences, columns = slots.shape
    written, step_rows = (state, slots) if steps is None else steps
    config: dict[str, Any] = configuration(value_heads, key_dim, value_dim)
    if sequences == 0 or out.numel() == 0:
        return
    recurrent_kernel[(sequences * value_heads * triton.cdiv(value_dim, config["BLOCK_V"]),)](
        q, k, v, a, b, A_log, dt_bias, out, state, written, slots,
        slots if query_start_loc is None else query_start_loc,
        slots if accepted is None else accepted,
        slots.flatten().view(torch.bool) if has_initial is None else has_initial,
        step_rows,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], a.stride(0), b.stride(0),
        state.stride(0),
        0 if steps is None else written.stride(0),
        0 if steps is None else written.stride(1),
        columns,
        columns if steps is None else written.shape[1],
        DECODE if query_start_loc is None else TAIL if accepted is None else VERIFY,
        int(steps is not None),
        H=key_heads, HV=value_heads, K=key_dim, V=value_dim, C=CHUNK_SIZE, SHORT=RECURRENT_TOKENS, EPS=L2_NORM_EPS,
        enable_fp_fusion=False,
        **config,
    )  # fmt: skip
