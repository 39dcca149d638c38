"""Depthwise causal convolution with SiLU over ragged batches, with its state in a pool of slots.

    y[t, d] = SiLU( Σ_w weight[d, w] · x[t − (W − 1) + w, d] )

It is the short convolution in front of the gated delta rule (Gated Delta Networks, arXiv 2412.06464, section 3.4;
transformers' ``causal_conv1d_fn`` and ``causal_conv1d_update``). Inputs before the first token of a call come from the
sequence's slot of ``conv_state``. Sums are float32 in a fixed order, so prefill, decode and verify agree bitwise. If
the pool's dtype is narrower than that of ``x``, an output takes its own token as it comes and the ones before it as the
pool keeps them, rounded, wherever they come from.

The state of a slot is a window of ``state_len ≥ W − 1`` inputs along its last axis. With ``state_len = W − 1`` it holds
the last inputs. A pool for speculative decoding has ``state_len = W − 1 + S`` for S draft tokens: after a verify of n
tokens the inputs that precede the continuation behind ``a`` accepted ones start at offset ``a − 1``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext_kernels.causal_conv1d.cpu import CpuBackend
from qnext_kernels.causal_conv1d.native import CausalConv1dNative
from qnext_kernels.causal_conv1d.reference import ReferenceBackend
from qnext_kernels.causal_conv1d.triton import TritonCausalConv1d
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
from qnext_kernels.dispatch import Operation
from qnext_kernels.layouts import once_per_layout

operation = Operation("causal_conv1d", [CausalConv1dNative(), CpuBackend(), TritonCausalConv1d(), ReferenceBackend()])


def causal_conv1d_prefill(
    x: Tensor,
    weight: Tensor,
    conv_state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    has_initial_state: Tensor,
    snapshot_slots: Tensor | None = None,
    snapshot_lengths: Tensor | None = None,
    key_dim: int | None = None,
) -> Tensor:
    """Convolve N sequences of any length and leave their last W − 1 inputs at offset 0 of their slots.

    A snapshot is what a prefill of the first ``snapshot_lengths[n]`` tokens alone would leave: the W − 1 inputs before
    the next token, at offset 0 of a further slot.

    Args:
        x: [T, D] inputs, the sequences' tokens one after another; any float dtype. With ``key_dim`` [T, H, 2 K + G V],
            grouped by key head as a projection leaves them: of each its q, its k and the v of its G value heads. The D
            channels are then those of all q, of all k and of all v.
        weight: [D, W].
        conv_state: [slots, D, state_len] pool, any strides; written in place for sequences of at least one token, and
            for snapshots.
        slots: [N] int32 or int64; slot −1 is skipped: its state is neither read nor written, its outputs are zero and
            it has no snapshot.
        query_start_loc: [N + 1] int32 or int64, where each sequence starts in ``x``.
        has_initial_state: [N] bool; where False the inputs before the first token are zero.
        snapshot_slots: [N] int32 or int64; −1: no snapshot. Undefined unless the slots of all sequences and of all
            snapshots differ. Given with ``snapshot_lengths`` or not at all.
        snapshot_lengths: [N] int32 or int64, 0 to the length of the sequence; any value without a snapshot slot.
        key_dim: K of a grouped ``x``, which our kernels read where it lies; else None.

    Returns:
        [T, D] in the dtype of ``x``.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; nothing has been written.
    """
    batch = (x, weight, conv_state, slots, query_start_loc, has_initial_state)
    snapshots = expect_both_or_neither("snapshot_slots", snapshot_slots, "snapshot_lengths", snapshot_lengths)
    backend = _prefill_backend(*batch, snapshot_slots, snapshot_lengths, key_dim)
    return backend.prefill(*batch, snapshots, key_dim)


def causal_conv1d_verify(
    x: Tensor,
    weight: Tensor,
    conv_state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    num_accepted_tokens: Tensor,
    step_state: Tensor | None = None,
    step_rows: Tensor | None = None,
) -> Tensor:
    """Convolve a few tokens a sequence (the last accepted one and its drafts) so that any number can be taken back.

    With a step pool ``conv_state`` is only read: the W − 1 inputs before the token behind token t of sequence n go to
    ``step_state[step_rows[n], t]``. Steps that a sequence has no token for keep what they had.

    Args:
        x: [T, D] inputs; any float dtype.
        weight: [D, W].
        conv_state: [slots, D, state_len] pool, any strides. Without a step pool it is written in place, and a sequence
            may have at most ``state_len − W + 2`` tokens.
        slots: [N] int32 or int64; slot −1 is skipped: its outputs are zero, nothing is written.
        query_start_loc: [N + 1] int32 or int64.
        num_accepted_tokens: [N] int32 or int64, how many tokens of the previous verify were accepted, 1 to
            ``state_len − W + 2``; the inputs before the first token start at offset ``num_accepted_tokens − 1``.
        step_state: [rows, S, D, W − 1] in the dtype of ``conv_state``, any strides, written in place; a sequence may
            have at most S tokens. Steps of a row may share memory as their windows do: step t at columns t to
            t + W − 2 of D × (S + W − 2) inputs. Given with ``step_rows`` or not at all.
        step_rows: [N] int32 or int64, different from each other; −1: only the outputs are computed.

    Returns:
        [T, D] in the dtype of ``x``.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; nothing has been written.
    """
    batch = (x, weight, conv_state, slots, query_start_loc, num_accepted_tokens)
    steps = expect_both_or_neither("step_state", step_state, "step_rows", step_rows)
    return _verify_backend(*batch, step_state, step_rows).verify(*batch, steps)


def causal_conv1d_decode(x: Tensor, weight: Tensor, conv_state: Tensor, slots: Tensor) -> Tensor:
    """Convolve one token a sequence: :func:`causal_conv1d_verify` of one token behind one accepted.

    Args:
        x: [N, D] inputs; any float dtype.
        weight: [D, W].
        conv_state: [slots, D, state_len] pool, any strides, written in place.
        slots: [N] int32 or int64; slot −1 is skipped and its outputs are zero.

    Returns:
        [N, D] in the dtype of ``x``.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; nothing has been written.
    """
    return _decode_backend(x, weight, conv_state, slots).decode(x, weight, conv_state, slots)


@once_per_layout
def _prefill_backend(
    x: Tensor,
    weight: Tensor,
    conv_state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    has_initial_state: Tensor,
    snapshot_slots: Tensor | None,
    snapshot_lengths: Tensor | None,
    key_dim: int | None,
) -> Any:
    """Check the arguments of a prefill; return the backend for it."""
    num_sequences = _check(x, weight, conv_state, slots, query_start_loc, key_dim)
    expect_shape("has_initial_state", has_initial_state, (num_sequences,))
    expect_dtype("has_initial_state", has_initial_state, (torch.bool,))
    if snapshot_slots is not None and snapshot_lengths is not None:
        expect_snapshots(snapshot_slots, snapshot_lengths, query_start_loc, conv_state.shape[0])
    return operation.select(x.device, x.dtype)


@once_per_layout
def _verify_backend(
    x: Tensor,
    weight: Tensor,
    conv_state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    num_accepted_tokens: Tensor,
    step_state: Tensor | None,
    step_rows: Tensor | None,
) -> Any:
    """Check the arguments of a verify; return the backend for it."""
    num_sequences = _check(x, weight, conv_state, slots, query_start_loc)
    most = conv_state.shape[2] - weight.shape[1] + 2
    expect_shape("num_accepted_tokens", num_accepted_tokens, (num_sequences,))
    expect_indices("num_accepted_tokens", num_accepted_tokens, 1, most + 1)
    if step_state is not None and step_rows is not None:
        expect_shape("step_state", step_state, (None, None, x.shape[1], weight.shape[1] - 1))
        expect_dtype("step_state", step_state, (conv_state.dtype,))
        expect_shape("step_rows", step_rows, (num_sequences,))
        expect_indices("step_rows", step_rows, -1, step_state.shape[0])
        most = step_state.shape[1]
    if query_start_loc.is_cpu and longest_sequence(query_start_loc) > most:
        raise ValueError(f"query_start_loc: expected at most {most} tokens a sequence, got {query_start_loc.tolist()}")
    return operation.select(x.device, x.dtype)


@once_per_layout
def _decode_backend(x: Tensor, weight: Tensor, conv_state: Tensor, slots: Tensor) -> Any:
    """Check the arguments of a decode; return the backend for it."""
    _check(x, weight, conv_state, slots, None)
    return operation.select(x.device, x.dtype)


def _check(
    x: Tensor,
    weight: Tensor,
    conv_state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor | None,
    key_dim: int | None = None,
) -> int:
    expect_shape("x", x, (None, None) if key_dim is None else (None, None, None))
    expect_floating("x", x)
    channels = x.shape[1:].numel()
    if key_dim is not None and not 0 < 2 * key_dim <= x.shape[2]:
        raise ValueError(f"key_dim: expected 1 to {x.shape[2] // 2} for x {list(x.shape)}, got {key_dim}")
    expect_shape("weight", weight, (channels, None))
    expect_floating("weight", weight)
    if weight.shape[1] == 0:
        raise ValueError("weight: expected a kernel of at least one input, got none")
    expect_shape("conv_state", conv_state, (None, channels, None))
    expect_floating("conv_state", conv_state)
    if conv_state.shape[2] < weight.shape[1] - 1:
        raise ValueError(
            f"conv_state: expected at least {weight.shape[1] - 1} inputs a slot, got {conv_state.shape[2]}"
        )
    num_sequences = x.shape[0] if query_start_loc is None else expect_query_start_loc(query_start_loc, x.shape[0])
    expect_shape("slots", slots, (num_sequences,))
    expect_indices("slots", slots, -1, conv_state.shape[0])
    return num_sequences
