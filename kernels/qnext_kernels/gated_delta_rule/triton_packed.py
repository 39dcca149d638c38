"""What surrounds a library's kernels: normalised rows, states between slots and one behind another, padding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.gated_delta_rule.reference import L2_NORM_EPS
from qnext_kernels.gated_delta_rule.triton_math import inverse_norms
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_support import ceil_div, power_of_two, rows

BLOCK = 4096
"""Elements of a program: 32 a thread of four warps."""


@triton.jit
def normalize_kernel(  # type: ignore[no-untyped-def]
    x, out, x_token, x_head, count,
    H: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """out[t, h] = x[t, h] / √(Σ x² + EPS), in float32 and rounded once.

    Grid: ceil(T · H / ROWS). Bytes: x read and as much written.

    Args:
        x: [T, H, K] of unit last stride; out: contiguous; count: T · H.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keys = tl.arange(0, BLOCK_K)
    inside = (row < count)[:, None] & (keys < K)[None, :]
    at = (row // H) * x_token + (row % H) * x_head
    values = tl.load(x + at[:, None] + keys[None, :], mask=inside, other=0.0).to(tl.float32)
    values = values * inverse_norms(values, ROWS, BLOCK_K, EPS)[:, None]
    tl.store(out + row[:, None] * K + keys[None, :], values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def load_kernel(  # type: ignore[no-untyped-def]
    pool, packed, slots, has_initial, pool_slot, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """packed[n] = pool[slots[n]] in float32; zero where there is no slot or no state yet.

    Grid: N · ceil(SIZE / BLOCK). Bytes: a state read and a float32 state written for each sequence.

    Args:
        pool: a slot is ``pool_slot`` elements from the next; packed: contiguous [N, SIZE] float32.
        slots, has_initial: [N].
    """
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    at = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + n).to(tl.int64)
    known = (slot >= 0) & (tl.load(has_initial + n) != 0)
    state = tl.load(pool + slot * pool_slot + at, mask=(at < SIZE) & known, other=0.0)
    tl.store(packed + n * SIZE + at, state.to(tl.float32), mask=at < SIZE)


@triton.jit
def save_kernel(  # type: ignore[no-untyped-def]
    packed, pool, slots, query_start_loc, packed_n, pool_slot, pool_step,
    STEPS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """pool[slots[n, t], t] = packed[n, t]; nothing where there is no slot or the sequence has no token t.

    Grid: N · STEPS · ceil(SIZE / BLOCK). Bytes: a float32 state read and a state written for each that has a slot.

    Args:
        packed: [N, STEPS or more, SIZE] float32, a sequence ``packed_n`` elements from the next.
        pool: a slot is ``pool_slot`` elements from the next, a step in it ``pool_step``: 0 where slots have no steps.
        slots: contiguous [N, STEPS]; query_start_loc: [N + 1].
    """
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    n, t = row // STEPS, row % STEPS
    at = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + row).to(tl.int64)
    written = (slot >= 0) & (tl.load(query_start_loc + n) + t < tl.load(query_start_loc + n + 1))
    state = tl.load(packed + n * packed_n + t * SIZE + at, mask=(at < SIZE) & written, other=0.0)
    to = pool + slot * pool_slot + t * pool_step + at
    tl.store(to, state.to(pool.dtype.element_ty), mask=(at < SIZE) & written)


@triton.jit
def clear_kernel(out, slots, query_start_loc, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Zero the outputs of sequences without a slot.

    Grid: N · ceil(SIZE / BLOCK), each over all tokens of its sequence: padding is rare, and there is no other work.

    Args:
        out: contiguous [T, SIZE].
    """
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    at = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), dtype=out.dtype.element_ty)
    start = tl.load(query_start_loc + n).to(tl.int64)
    end = tl.where(tl.load(slots + n) < 0, tl.load(query_start_loc + n + 1).to(tl.int64), start)
    for t in range((end - start).to(tl.int32)):
        tl.store(out + (start + t) * SIZE + at, zero, mask=at < SIZE)


def normalized(x: Tensor) -> Tensor:
    """x [T, H, K] with heads of L2 norm 1 (ε 1e-6), contiguous, in the dtype of x."""
    x = rows(x)
    tokens, heads, key_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = power_of_two(key_dim)
    at_once = max(1, BLOCK // width)
    launch(
        normalize_kernel, (ceil_div(tokens * heads, at_once),),
        x, out, x.stride(0), x.stride(1), tokens * heads,
        H=heads, K=key_dim, BLOCK_K=width, ROWS=at_once, EPS=L2_NORM_EPS, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def load_states(state: Tensor, slots: Tensor, has_initial: Tensor) -> Tensor:
    """The states that N sequences start from.

    Args:
        state: [slots, HV, V, K] pool, contiguous within a slot.
        slots: [N] contiguous; −1: none.
        has_initial: [N] contiguous bool; where False the state is zero.

    Returns:
        [N, HV, V, K] float32.
    """
    packed = torch.empty((len(slots), *state.shape[1:]), dtype=torch.float32, device=state.device)
    size = state[0].numel()
    launch(
        load_kernel, (len(slots) * ceil_div(size, BLOCK),),
        state, packed, slots, has_initial, state.stride(0), SIZE=size, BLOCK=BLOCK, enable_fp_fusion=True,
    )  # fmt: skip
    return packed


def save_states(packed: Tensor, pool: Tensor, slots: Tensor, query_start_loc: Tensor) -> None:
    """Put states into their slots, rounded to the dtype of the pool, where a sequence has tokens.

    Args:
        packed: [N, HV, V, K], or [N, steps, HV, V, K] of states behind every token; contiguous.
        pool: [slots, HV, V, K], or [rows, steps, HV, V, K], contiguous behind the dimensions that are indexed.
        slots: [N], or [N, steps] of at most the steps of ``packed``; contiguous. −1: none.
    """
    steps = slots.shape[1] if slots.dim() == 2 else 1
    pool_step = pool.stride(1) if pool.dim() == 5 else 0
    size = pool.shape[-3:].numel()
    launch(
        save_kernel, (slots.numel() * ceil_div(size, BLOCK),),
        packed, pool, slots, query_start_loc, packed.stride(0), pool.stride(0), pool_step,
        STEPS=steps, SIZE=size, BLOCK=BLOCK, enable_fp_fusion=True,
    )  # fmt: skip


def clear_skipped(out: Tensor, slots: Tensor, query_start_loc: Tensor) -> None:
    """Zero the outputs, contiguous [T, HV, V], of sequences with slot −1."""
    size = out.shape[1] * out.shape[2]
    launch(
        clear_kernel, (len(slots) * ceil_div(size, BLOCK),),
        out, slots, query_start_loc, SIZE=size, BLOCK=BLOCK, enable_fp_fusion=True,
    )  # fmt: skip
