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
prefill split at multiples of :data:`CHUNK_SIZE` equals the unsplit one.

Common arguments:

    q, k:     [T, H, K] and v: [T, HV, V], one float dtype; HV a multiple of H
    a, b:     [T, HV], any float dtype
    A_log, dt_bias: [HV], any float dtype
    state:    [slots, HV, V, K] pool, any float dtype, dim 0 of any stride; written in place
    query_start_loc: [N + 1] int32 or int64, where each sequence starts in the tokens
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.checks import expect_dtype, expect_floating, expect_indices, expect_query_start_loc, expect_shape
from qnext_kernels.dispatch import Operation
from qnext_kernels.gated_delta_rule.cpu import CpuBackend
from qnext_kernels.gated_delta_rule.reference import CHUNK_SIZE, ReferenceBackend

__all__ = ["CHUNK_SIZE", "gated_delta_rule_decode", "gated_delta_rule_prefill", "gated_delta_rule_verify"]

operation = Operation("gated_delta_rule", [CpuBackend(), ReferenceBackend()])


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
) -> Tensor:
    """Run N sequences of any length and leave each final state in its slot.

    Args:
        q, k, v, a, b, A_log, dt_bias, state, query_start_loc: see the module.
        slots: [N] int32 or int64; slot −1 is skipped: its state is neither read nor written, its outputs are zero.
        has_initial_state: [N] bool; where False the sequence starts from a zero state.

    Returns:
        [T, HV, V] in the dtype of ``v``.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; nothing has been written.
    """
    num_sequences = _check(q, k, v, a, b, A_log, dt_bias, state, query_start_loc)
    expect_shape("slots", slots, (num_sequences,))
    expect_indices("slots", slots, -1, state.shape[0])
    expect_shape("has_initial_state", has_initial_state, (num_sequences,))
    expect_dtype("has_initial_state", has_initial_state, (torch.bool,))
    backend = operation.select(v.device, v.dtype)
    return backend.prefill(q, k, v, a, b, A_log, dt_bias, state, slots, query_start_loc, has_initial_state)


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
) -> Tensor:
    """Run a few tokens a sequence (the last accepted one and its drafts), keeping the state behind every one.

    A sequence starts from the state in ``slots[n, num_accepted_tokens[n] − 1]``, where the previous verify left the
    state behind its last accepted token; the state behind token t goes to ``slots[n, t]``.

    Args:
        q, k, v, a, b, A_log, dt_bias, state, query_start_loc: see the module.
        slots: [N, S] int32 or int64; a sequence has at most S tokens. A state for slot −1 is not written; a sequence
            that would start from slot −1 is skipped and its outputs are zero.
        num_accepted_tokens: [N] int32 or int64, 1 to S.

    Returns:
        [T, HV, V] in the dtype of ``v``.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; nothing has been written.
    """
    num_sequences = _check(q, k, v, a, b, A_log, dt_bias, state, query_start_loc)
    expect_shape("slots", slots, (num_sequences, None))
    expect_indices("slots", slots, -1, state.shape[0])
    expect_shape("num_accepted_tokens", num_accepted_tokens, (num_sequences,))
    expect_indices("num_accepted_tokens", num_accepted_tokens, 1, slots.shape[1] + 1)
    on_cpu = query_start_loc.device.type == "cpu"
    if on_cpu and num_sequences and int(query_start_loc.diff().max()) > slots.shape[1]:
        raise ValueError(
            f"query_start_loc: expected at most {slots.shape[1]} tokens a sequence (one a column of slots), "
            f"got {query_start_loc.tolist()}"
        )
    backend = operation.select(v.device, v.dtype)
    return backend.verify(q, k, v, a, b, A_log, dt_bias, state, slots, query_start_loc, num_accepted_tokens)


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
    _check(q, k, v, a, b, A_log, dt_bias, state, None)
    expect_shape("slots", slots, (v.shape[0],))
    expect_indices("slots", slots, -1, state.shape[0])
    return operation.select(v.device, v.dtype).decode(q, k, v, a, b, A_log, dt_bias, state, slots)


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
    return num_tokens if query_start_loc is None else expect_query_start_loc(query_start_loc, num_tokens)
