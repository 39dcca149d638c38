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

import torch
from torch import Tensor

from qnext_kernels.causal_conv1d.cpu import CpuBackend
from qnext_kernels.causal_conv1d.reference import ReferenceBackend
from qnext_kernels.checks import expect_dtype, expect_floating, expect_indices, expect_query_start_loc, expect_shape
from qnext_kernels.dispatch import Operation

operation = Operation("causal_conv1d", [CpuBackend(), ReferenceBackend()])


def causal_conv1d_prefill(
    x: Tensor, weight: Tensor, conv_state: Tensor, slots: Tensor, query_start_loc: Tensor, has_initial_state: Tensor
) -> Tensor:
    """Convolve N sequences of any length and leave their last W − 1 inputs at offset 0 of their slots.

    Args:
        x: [T, D] inputs, the sequences' tokens one after another; any float dtype.
        weight: [D, W].
        conv_state: [slots, D, state_len] pool, any strides; written in place for sequences of at least one token.
        slots: [N] int32 or int64; slot −1 is skipped: its state is neither read nor written, its outputs are zero.
        query_start_loc: [N + 1] int32 or int64, where each sequence starts in ``x``.
        has_initial_state: [N] bool; where False the inputs before the first token are zero.

    Returns:
        [T, D] in the dtype of ``x``.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; nothing has been written.
    """
    num_sequences = _check(x, weight, conv_state, slots, query_start_loc)
    expect_shape("has_initial_state", has_initial_state, (num_sequences,))
    expect_dtype("has_initial_state", has_initial_state, (torch.bool,))
    backend = operation.select(x.device, x.dtype)
    return backend.prefill(x, weight, conv_state, slots, query_start_loc, has_initial_state)


def causal_conv1d_verify(
    x: Tensor, weight: Tensor, conv_state: Tensor, slots: Tensor, query_start_loc: Tensor, num_accepted_tokens: Tensor
) -> Tensor:
    """Convolve a few tokens a sequence (the last accepted one and its drafts) so that any number can be taken back.

    Args:
        x: [T, D] inputs; any float dtype.
        weight: [D, W].
        conv_state: [slots, D, state_len] pool, any strides, written in place; a sequence may have at most
            ``state_len − W + 2`` tokens.
        slots: [N] int32 or int64; slot −1 is skipped and its outputs are zero.
        query_start_loc: [N + 1] int32 or int64.
        num_accepted_tokens: [N] int32 or int64, how many tokens of the previous verify were accepted, 1 to
            ``state_len − W + 2``; the inputs before the first token start at offset ``num_accepted_tokens − 1``.

    Returns:
        [T, D] in the dtype of ``x``.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; nothing has been written.
    """
    num_sequences = _check(x, weight, conv_state, slots, query_start_loc)
    most = conv_state.shape[2] - weight.shape[1] + 2
    expect_shape("num_accepted_tokens", num_accepted_tokens, (num_sequences,))
    expect_indices("num_accepted_tokens", num_accepted_tokens, 1, most + 1)
    if query_start_loc.device.type == "cpu" and num_sequences and int(query_start_loc.diff().max()) > most:
        raise ValueError(f"query_start_loc: expected at most {most} tokens a sequence, got {query_start_loc.tolist()}")
    backend = operation.select(x.device, x.dtype)
    return backend.verify(x, weight, conv_state, slots, query_start_loc, num_accepted_tokens)


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
    _check(x, weight, conv_state, slots, None)
    return operation.select(x.device, x.dtype).decode(x, weight, conv_state, slots)


def _check(x: Tensor, weight: Tensor, conv_state: Tensor, slots: Tensor, query_start_loc: Tensor | None) -> int:
    expect_shape("x", x, (None, None))
    expect_floating("x", x)
    expect_shape("weight", weight, (x.shape[1], None))
    expect_floating("weight", weight)
    if weight.shape[1] == 0:
        raise ValueError("weight: expected a kernel of at least one input, got none")
    expect_shape("conv_state", conv_state, (None, x.shape[1], None))
    expect_floating("conv_state", conv_state)
    if conv_state.shape[2] < weight.shape[1] - 1:
        raise ValueError(
            f"conv_state: expected at least {weight.shape[1] - 1} inputs a slot, got {conv_state.shape[2]}"
        )
    num_sequences = x.shape[0] if query_start_loc is None else expect_query_start_loc(query_start_loc, x.shape[0])
    expect_shape("slots", slots, (num_sequences,))
    expect_indices("slots", slots, -1, conv_state.shape[0])
    return num_sequences
