"""The gated delta rule over ragged batches, with its recurrent state in a pool of slots.

For one value head with state S (value dim × key dim, the key dim last; Gated Delta Networks, arXiv 2412.06464, equation
10; transformers' ``torch_recurrent_gated_delta_rule`` and ``torch_chunk_gated_delta_rule``):

    g_t = −exp(A_log) · softplus(a_t + dt_bias)      β_t = sigmoid(b_t)
    q_t, k_t ← L2-normalised (ε 1e-6), q_t scaled by 1/√K
    S ← exp(g_t) · S
    S ← S + β_t (v_t − S k_t) ⊗ k_t
    o_t = S q_t

A value head h reads key head h // (HV / H). Gating, norm and scale are part of the operation. Three promises hold
bitwise: verify over T tokens equals T decodes; a sequence's result does not depend on what else is in the batch; a
prefill split at multiples of :data:`CHUNK_SIZE` equals the unsplit one (in the deterministic mode split anywhere).
They are those of our own backends, with larger multiples in :class:`TritonContextParallel`; FlashInfer and FlashQLA do
not keep them. These three serve where they are asked for.

Common arguments:

    q, k:     [T, H, K] and v: [T, HV, V], one float dtype; HV a multiple of H
    a, b:     [T, HV], any float dtype
    A_log, dt_bias: [HV], any float dtype
    state:    [slots, HV, V, K] pool, any float dtype, dim 0 of any stride; written in place
    query_start_loc: [N + 1] int32 or int64, where each sequence starts in the tokens
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext_kernels.checks import (
    expect_both_or_neither,
    expect_dtype,
    expect_floating,
    expect_indices,
    expect_query_start_loc,
    expect_shape,
    expect_snapshots,
    longest_sequence,
)
from qnext_kernels.dispatch import Call, Operation, refuse_if_deterministic
from qnext_kernels.gated_delta_rule.context_parallel import TritonContextParallel
from qnext_kernels.gated_delta_rule.cpu import CpuBackend
from qnext_kernels.gated_delta_rule.flash_qla import FlashQlaGatedDeltaRule
from qnext_kernels.gated_delta_rule.flashinfer import FlashInferGatedDeltaRule
from qnext_kernels.gated_delta_rule.native import GatedDeltaRuleNative
from qnext_kernels.gated_delta_rule.reference import CHUNK_SIZE, ReferenceBackend
from qnext_kernels.gated_delta_rule.triton import TritonGatedDeltaRule
from qnext_kernels.layouts import once_per_layout

__all__ = ["CHUNK_SIZE", "gated_delta_rule_decode", "gated_delta_rule_prefill", "gated_delta_rule_verify"]

operation = Operation(
    "gated_delta_rule",
    [
        GatedDeltaRuleNative(),
        CpuBackend(),
        TritonGatedDeltaRule(),
        TritonContextParallel(),
        FlashInferGatedDeltaRule(),
        FlashQlaGatedDeltaRule(),
        ReferenceBackend(),
    ],
)


def gated_delta_rule_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    has_initial_state: Tensor,
    snapshot_slots: Tensor | None = None,
    snapshot_lengths: Tensor | None = None,
) -> Tensor:
    """Run N sequences of any length and leave each final state in its slot.

    A snapshot is, bitwise, the state that a prefill of the first ``snapshot_lengths[n]`` tokens alone would leave, in a
    further slot; behind 0 tokens it is the state that the sequence starts from.

    Args:
        q, k, v, a, b, A_log, dt_bias, state, query_start_loc: see the module.
        slots: [N] int32 or int64; slot −1 is skipped: its state is neither read nor written, its outputs are zero and
            it has no snapshot.
        has_initial_state: [N] bool; where False the sequence starts from a zero state.
        snapshot_slots: [N] int32 or int64; −1: no snapshot. Undefined unless the slots of all sequences and of all
            snapshots differ. Given with ``snapshot_lengths`` or not at all.
        snapshot_lengths: [N] int32 or int64, multiples of :data:`CHUNK_SIZE` from 0 to the length of the sequence; any
            value without a snapshot slot.

    Returns:
        [T, HV, V] in the dtype of ``v``.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; nothing has been written.
    """
    batch = (q, k, v, a, b, A_log, dt_bias, state, slots, query_start_loc, has_initial_state)
    snapshots = expect_both_or_neither("snapshot_slots", snapshot_slots, "snapshot_lengths", snapshot_lengths)
    return _prefill_backend(*batch, snapshot_slots, snapshot_lengths).prefill(*batch, snapshots)


def gated_delta_rule_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    num_accepted_tokens: Tensor,
    step_state: Tensor | None = None,
    step_rows: Tensor | None = None,
) -> Tensor:
    """Run a few tokens a sequence (the last accepted one and its drafts), keeping the state behind every one.

    A sequence starts from the state in ``slots[n, num_accepted_tokens[n] − 1]``, where the previous verify left the
    state behind its last accepted token; the state behind token t goes to ``slots[n, t]``.

    With a step pool ``state`` is only read and ``slots`` only says where to start: the state behind token t goes to
    ``step_state[step_rows[n], t]``, rounded to the dtype of the step pool, and the next token continues from there.
    Steps that a sequence has no token for keep what they had.

    Args:
        q, k, v, a, b, A_log, dt_bias, state, query_start_loc: see the module.
        slots: [N, S] int32 or int64; a sequence has at most S tokens unless there is a step pool. A state for slot −1
            is not written; a sequence that would start from slot −1 is skipped: its outputs are zero, nothing is
            written.
        num_accepted_tokens: [N] int32 or int64, 1 to S.
        step_state: [rows, steps, HV, V, K], any float dtype, dims 0 and 1 of any stride, written in place; a sequence
            has at most as many tokens as there are steps. Given with ``step_rows`` or not at all.
        step_rows: [N] int32 or int64, different from each other; −1: only the outputs are computed.

    Returns:
        [T, HV, V] in the dtype of ``v``.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; nothing has been written.
    """
    batch = (q, k, v, a, b, A_log, dt_bias, state, slots, query_start_loc, num_accepted_tokens)
    steps = expect_both_or_neither("step_state", step_state, "step_rows", step_rows)
    return _verify_backend(*batch, step_state, step_rows).verify(*batch, steps)


def gated_delta_rule_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
) -> Tensor:
    """Run one token a sequence, from the state in its slot to the state in its slot.

    Args:
        q, k, v, a, b, A_log, dt_bias, state: see the module, with T = N tokens.
        slots: [N] int32 or int64; slot −1 is skipped and its outputs are zero.

    Returns:
        [N, HV, V] in the dtype of ``v``.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; nothing has been written.
    """
    batch = (q, k, v, a, b, A_log, dt_bias, state, slots)
    return _decode_backend(*batch).decode(*batch)


@once_per_layout
def _prefill_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    has_initial_state: Tensor,
    snapshot_slots: Tensor | None,
    snapshot_lengths: Tensor | None,
) -> Any:
    """Check the arguments of a prefill; return the backend for it."""
    num_sequences = _check(q, k, v, a, b, A_log, dt_bias, state, query_start_loc)
    expect_shape("slots", slots, (num_sequences,))
    expect_indices("slots", slots, -1, state.shape[0])
    expect_shape("has_initial_state", has_initial_state, (num_sequences,))
    expect_dtype("has_initial_state", has_initial_state, (torch.bool,))
    if snapshot_slots is None or snapshot_lengths is None:
        return select_backend(q, v, a, state, "prefill", sequences=num_sequences)
    expect_snapshots(snapshot_slots, snapshot_lengths, query_start_loc, state.shape[0], multiple_of=CHUNK_SIZE)
    return select_backend(q, v, a, state, "prefill", ("snapshots",), num_sequences)


@once_per_layout
def _verify_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    num_accepted_tokens: Tensor,
    step_state: Tensor | None,
    step_rows: Tensor | None,
) -> Any:
    """Check the arguments of a verify; return the backend for it."""
    num_sequences = _check(q, k, v, a, b, A_log, dt_bias, state, query_start_loc)
    expect_shape("slots", slots, (num_sequences, None))
    expect_indices("slots", slots, -1, state.shape[0])
    expect_shape("num_accepted_tokens", num_accepted_tokens, (num_sequences,))
    expect_indices("num_accepted_tokens", num_accepted_tokens, 1, slots.shape[1] + 1)
    most, place = slots.shape[1], "column of slots"
    features: tuple[str, ...] = ()
    if step_state is not None and step_rows is not None:
        expect_shape("step_state", step_state, (None, None, *state.shape[1:]))
        expect_floating("step_state", step_state)
        expect_shape("step_rows", step_rows, (num_sequences,))
        expect_indices("step_rows", step_rows, -1, step_state.shape[0])
        most, place, features = step_state.shape[1], "step of step_state", step_features(step_state)
    if query_start_loc.is_cpu and longest_sequence(query_start_loc) > most:
        raise ValueError(
            f"query_start_loc: expected at most {most} tokens a sequence (one a {place}), "
            f"got {query_start_loc.tolist()}"
        )
    return select_backend(q, v, a, state, "verify", features)


@once_per_layout
def _decode_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
) -> Any:
    """Check the arguments of a decode; return the backend for it."""
    _check(q, k, v, a, b, A_log, dt_bias, state, None)
    expect_shape("slots", slots, (v.shape[0],))
    expect_indices("slots", slots, -1, state.shape[0])
    return select_backend(q, v, a, state, "decode")


def select_backend(
    q: Tensor, v: Tensor, a: Tensor, state: Tensor, method: str, features: tuple[str, ...] = (), sequences: int = 1
) -> Any:
    """The backend for a call of ``method`` whose arguments have been checked.

    Args:
        sequences: of a prefill: what is fastest for one long sequence is not for as many tokens of short ones.
    """
    if v.is_cpu:
        return operation.select(v.device, v.dtype)
    num_tokens, num_value_heads, value_dim = v.shape
    # Key heads, value heads, key dim, value dim; dtypes of states and of a.
    shape = (q.shape[1], num_value_heads, q.shape[2], value_dim)
    call = Call(method, num_tokens // max(1, sequences), shape, (state.dtype, a.dtype), features)
    return operation.select(v.device, v.dtype, call)


def step_features(step_state: Tensor | None) -> tuple[str, ...]:
    """What a verify with this step pool, or without one, asks a backend for."""
    if step_state is None:
        return ()
    return ("step pool" if step_state.dtype == torch.float32 else f"step pool in {step_state.dtype}",)


def refuse_rounded_state(state: Tensor) -> None:
    """Raise BackendError in the deterministic mode where states are rounded."""
    if state.dtype != torch.float32:
        refuse_if_deterministic("gated_delta_rule", f"a state in {state.dtype}, rounded wherever a call ends,")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    query_start_loc: Tensor | None,
) -> int:
    expect_shape("v", v, (None, None, None))
    num_tokens, num_value_heads, value_dim = v.shape
    expect_shape("q", q, (num_tokens, None, None))
    expect_shape("k", k, q.shape)
    if q.shape[1] == 0 or num_value_heads % q.shape[1]:
        raise ValueError(f"v: expected a multiple of {q.shape[1]} value heads (the key heads), got {num_value_heads}")
    for name, tensor in (("a", a), ("b", b)):
        expect_shape(name, tensor, (num_tokens, num_value_heads))
        expect_floating(name, tensor)
    for name, tensor in (("A_log", A_log), ("dt_bias", dt_bias)):
        expect_shape(name, tensor, (num_value_heads,))
        expect_floating(name, tensor)
    expect_floating("v", v)
    for name, tensor in (("q", q), ("k", k)):
        expect_dtype(name, tensor, (v.dtype,))
    expect_shape("state", state, (None, num_value_heads, value_dim, q.shape[2]))
    expect_floating("state", state)
    refuse_rounded_state(state)
    return num_tokens if query_start_loc is None else expect_query_start_loc(query_start_loc, num_tokens)
