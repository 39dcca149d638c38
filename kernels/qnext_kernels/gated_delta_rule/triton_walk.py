"""A prefill token by token, of any length: that of the deterministic mode, where a cut changes no bit."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.gated_delta_rule.reference import L2_NORM_EPS
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
from qnext_kernels.triton_support import ceil_div, current_target, power_of_two

ROWS = 16
"""Of a state, so many belong to a program of two warps, which share no sums."""

# None of it is compiled in, so that every prefill of a layer runs the same instructions.
_NOT_COMPILED_IN = [
    "v_token", "v_head", "a_token", "b_token", "with_snapshots",
]  # fmt: skip
_OF_ANY_ALIGNMENT = [
    "v", "a", "b", "A_log", "dt_bias", "out",
    "slots", "query_start_loc", "has_initial", "snapshot_slots", "snapshot_lengths",
]  # fmt: skip


@triton.jit(do_not_specialize=_NOT_COMPILED_IN, do_not_specialize_on_alignment=_OF_ANY_ALIGNMENT)
def walk_kernel(  # type: ignore[no-untyped-def]
    q, k, v, a, b, A_log, dt_bias, out, state, slots, query_start_loc, has_initial, snapshot_slots, snapshot_lengths,
    q_token, q_head, k_token, k_head, v_token, v_head, a_token, b_token, state_slot, with_snapshots,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PART: tl.constexpr, BLOCK_V: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """Some rows of the state of one value head of one sequence, over all its tokens.

    It shares ``step`` with ``recurrent_kernel`` and is compiled with the same order of sums, so that a token has the
    bits of a decode. The state stays in registers and goes to memory behind the last token, and behind the snapshot's;
    it is rounded to the dtype of the pool behind every token, as a decode leaves it. Two tokens are under way from
    memory while one is computed.

    Grid: N · HV · ceil(V / BLOCK_V), the blocks of one head next to each other.

    Bytes: q and k are read by every block of a head, from a cache by all but one. The tokens of a sequence follow each
    other: what takes time is that chain, about ten operations a state element and token.

    Args:
        q, k, v, a, b, A_log, dt_bias, out, state: of ``recurrent_kernel``; the state is read and written.
        slots, has_initial, snapshot_slots, snapshot_lengths: contiguous [N]; query_start_loc: [N + 1].
        with_snapshots: 0: there are none, and the two are not read.
    """
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    head = (program // BLOCKS) % HV
    n = (program // (BLOCKS * HV)).to(tl.int64)
    values = (program % BLOCKS) * BLOCK_V + tl.arange(0, BLOCK_V)
    key = keys_of_part(PART)
    has_value = values < V
    row = head * V * K + values[:, None] * K
    key_head = head // (HV // H)

    start = tl.load(query_start_loc + n).to(tl.int64)
    end = tl.load(query_start_loc + n + 1).to(tl.int64)
    slot = tl.load(slots + n).to(tl.int64)
    live = slot >= 0
    place = state + slot * state_slot + row
    known = live & (tl.load(has_initial + n) != 0)
    rows = has_value[:, None]
    S = cast_parts(load_parts(place, key[None, :], rows & known, K, PART), tl.float32)

    snapshot = tl.load(snapshot_slots + n, mask=live & (with_snapshots != 0), other=-1).to(tl.int64)
    behind = tl.load(snapshot_lengths + n, mask=snapshot >= 0, other=-1).to(tl.int64)
    kept = state + snapshot * state_slot + row
    store_parts(kept, key[None, :], cast_parts(S, state.dtype.element_ty), rows & (behind == 0), K, PART)

    q += key_head * q_head
    k += key_head * k_head
    v += head * v_head + values
    a += head
    b += head
    A = tl.load(A_log + head).to(tl.float32)
    bias = tl.load(dt_bias + head).to(tl.float32)
    q_0, k_0, v_0, a_0, b_0 = load_token(
        start, end, q, k, v, a, b, q_token, k_token, v_token, a_token, b_token, key, has_value, K, PART
    )
    q_1, k_1, v_1, a_1, b_1 = load_token(
        start + 1, end, q, k, v, a, b, q_token, k_token, v_token, a_token, b_token, key, has_value, K, PART
    )
    for t in range((end - start).to(tl.int32)):
        token = start + t
        q_2, k_2, v_2, a_2, b_2 = load_token(
            token + 2, end, q, k, v, a, b, q_token, k_token, v_token, a_token, b_token, key, has_value, K, PART
        )
        S, o = step(S, q_0, k_0, v_0, a_0, b_0, A, bias, K, EPS)
        o = tl.where(live, o, 0.0)
        tl.store(out + (token * HV + head) * V + values, o.to(out.dtype.element_ty), mask=has_value)
        rounded = cast_parts(S, state.dtype.element_ty)
        S = cast_parts(rounded, tl.float32)
        if t + 1 == behind:
            store_parts(kept, key[None, :], rounded, rows, K, PART)
        q_0, k_0, v_0, a_0, b_0 = q_1, k_1, v_1, a_1, b_1
        q_1, k_1, v_1, a_1, b_1 = q_2, k_2, v_2, a_2, b_2
    last = cast_parts(S, state.dtype.element_ty)
    store_parts(place, key[None, :], last, rows & live & (start < end), K, PART)


def run_walk(
    tokens: tuple[Tensor, ...],
    out: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    has_initial: Tensor,
    snapshots: tuple[Tensor, Tensor] | None,
) -> None:
    """Launch :func:`walk_kernel`.

    Args:
        tokens: q, k, v, a, b (rows of unit stride), A_log and dt_bias (contiguous).
        out: [T, HV, V], written.
        state, slots, query_start_loc, has_initial, snapshots: of the public function, indices and flags contiguous.
    """
    q, k, v, a, b, A_log, dt_bias = tokens
    value_heads, value_dim = v.shape[1:]
    key_heads, key_dim = q.shape[1:]
    block_v = min(ROWS, power_of_two(value_dim))
    if slots.shape[0] == 0 or state.numel() == 0:
        return
    snapshot_slots, snapshot_lengths = (slots, slots) if snapshots is None else snapshots
    # With states in 16 bits the assembler of NVIDIA would stop at 128 registers and keep some of them in memory.
    options = {"maxnreg": 168} if state.itemsize == 2 and current_target().nvidia else {}
    launch(
        walk_kernel, (slots.shape[0] * value_heads * ceil_div(value_dim, block_v),),
        q, k, v, a, b, A_log, dt_bias, out, state, slots, query_start_loc, has_initial,
        snapshot_slots, snapshot_lengths,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], a.stride(0), b.stride(0), state.stride(0),
        int(snapshots is not None),
        H=key_heads, HV=value_heads, K=key_dim, V=value_dim, PART=part_of(key_dim), BLOCK_V=block_v,
        EPS=L2_NORM_EPS, num_warps=2, num_stages=1, enable_fp_fusion=False, **options,
    )  # fmt: skip
