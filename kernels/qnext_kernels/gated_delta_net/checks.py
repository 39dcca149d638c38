"""The checks of a fused call, before any of its parts has written."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.checks import (
    expect_dtype,
    expect_floating,
    expect_indices,
    expect_query_start_loc,
    expect_shape,
    expect_snapshots,
    longest_sequence,
)
from qnext_kernels.gated_delta_rule import CHUNK_SIZE, refuse_rounded_state
from qnext_kernels.layouts import once_per_layout

Steps = tuple[Tensor, Tensor, Tensor]
"""The step pools of the convolution and of the rule, and their rows."""


def check_decode(
    qkvz: Tensor,
    ba: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    slots: Tensor,
) -> None:
    """Raise unless the arguments of a decode fit."""
    check_layer(qkvz, ba, conv_weight, A_log, dt_bias, norm_weight, conv_state, state)
    expect_shape("slots", slots, (qkvz.shape[0],))
    expect_indices("slots", slots, -1, min(state.shape[0], conv_state.shape[0]))


@once_per_layout
def check_prefill(
    qkvz: Tensor,
    ba: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    has_initial_state: Tensor,
    snapshot_slots: Tensor | None,
    snapshot_lengths: Tensor | None,
) -> None:
    """Raise unless the arguments of a prefill fit."""
    check_layer(qkvz, ba, conv_weight, A_log, dt_bias, norm_weight, conv_state, state)
    num_sequences = expect_query_start_loc(query_start_loc, qkvz.shape[0])
    expect_shape("slots", slots, (num_sequences,))
    num_slots = min(state.shape[0], conv_state.shape[0])
    expect_indices("slots", slots, -1, num_slots)
    expect_shape("has_initial_state", has_initial_state, (num_sequences,))
    expect_dtype("has_initial_state", has_initial_state, (torch.bool,))
    if snapshot_slots is not None and snapshot_lengths is not None:
        expect_snapshots(snapshot_slots, snapshot_lengths, query_start_loc, num_slots, multiple_of=CHUNK_SIZE)


def check_verify(
    qkvz: Tensor,
    ba: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    num_accepted_tokens: Tensor,
    pools: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Steps | None:
    """Raise unless the arguments of a verify fit; return the step pools, None where there are none."""
    check_layer(qkvz, ba, conv_weight, A_log, dt_bias, norm_weight, conv_state, state)
    num_sequences = expect_query_start_loc(query_start_loc, qkvz.shape[0])
    expect_shape("slots", slots, (num_sequences, None))
    expect_indices("slots", slots, -1, state.shape[0])
    expect_indices("slots", slots[:, :1], -1, conv_state.shape[0])
    windows = conv_state.shape[2] - conv_weight.shape[1] + 2
    expect_shape("num_accepted_tokens", num_accepted_tokens, (num_sequences,))
    expect_indices("num_accepted_tokens", num_accepted_tokens, 1, min(slots.shape[1], windows) + 1)
    steps = _check_steps(pools, num_sequences, conv_weight, conv_state, state)
    most = min(slots.shape[1], windows) if steps is None else steps[0].shape[1]
    if query_start_loc.device.type == "cpu" and longest_sequence(query_start_loc) > most:
        raise ValueError(f"query_start_loc: expected at most {most} tokens a sequence, got {query_start_loc.tolist()}")
    return steps


def check_layer(
    qkvz: Tensor,
    ba: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
) -> None:
    """Raise unless projections, weights and pools fit each other."""
    expect_shape("state", state, (None, None, None, None))
    _, value_heads, value_dim, key_dim = state.shape
    expect_shape("qkvz", qkvz, (None, None, None))
    num_tokens, key_heads, _ = qkvz.shape
    if key_heads == 0 or value_heads % key_heads:
        raise ValueError(f"qkvz: expected a number of key heads that divides {value_heads}, got {key_heads}")
    group = value_heads // key_heads
    expect_shape("qkvz", qkvz, (num_tokens, key_heads, 2 * key_dim + 2 * group * value_dim))
    expect_shape("ba", ba, (num_tokens, key_heads, 2 * group))
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    expect_shape("conv_weight", conv_weight, (channels, None))
    width = conv_weight.shape[1]
    if width == 0:
        raise ValueError("conv_weight: expected a kernel of at least one input, got none")
    expect_shape("A_log", A_log, (value_heads,))
    expect_shape("dt_bias", dt_bias, (value_heads,))
    expect_shape("norm_weight", norm_weight, (value_dim,))
    expect_shape("conv_state", conv_state, (None, channels, None))
    if conv_state.shape[2] < width - 1:
        raise ValueError(f"conv_state: expected at least {width - 1} inputs a slot, got {conv_state.shape[2]}")
    floats = {
        "qkvz": qkvz,
        "ba": ba,
        "conv_weight": conv_weight,
        "A_log": A_log,
        "dt_bias": dt_bias,
        "norm_weight": norm_weight,
        "conv_state": conv_state,
        "state": state,
    }
    for name, tensor in floats.items():
        expect_floating(name, tensor)
    refuse_rounded_state(state)


def _check_steps(
    pools: tuple[Tensor | None, Tensor | None, Tensor | None],
    num_sequences: int,
    conv_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
) -> Steps | None:
    conv_steps, steps, rows = pools
    if conv_steps is None and steps is None and rows is None:
        return None
    if conv_steps is None or steps is None or rows is None:
        given = dict(zip(("conv_step_state", "step_state", "step_rows"), pools, strict=True))
        missing = next(name for name, tensor in given.items() if tensor is None)
        raise ValueError(f"{missing}: expected a tensor because another of {', '.join(given)} is given, got None")
    expect_shape("conv_step_state", conv_steps, (None, None, conv_weight.shape[0], conv_weight.shape[1] - 1))
    expect_dtype("conv_step_state", conv_steps, (conv_state.dtype,))
    expect_shape("step_state", steps, (None, conv_steps.shape[1], *state.shape[1:]))
    expect_floating("step_state", steps)
    expect_shape("step_rows", rows, (num_sequences,))
    expect_indices("step_rows", rows, -1, min(conv_steps.shape[0], steps.shape[0]))
    return conv_steps, steps, rows
