"""FlashInfer's ``gated_delta_rule_mtp`` by its documentation, in plain PyTorch, where there is no GPU for it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext_kernels.gated_delta_rule.flashinfer import FlashInferGatedDeltaRule
from qnext_kernels.gated_delta_rule.reference import gating, l2_norm, recurrence
from qnext_kernels.triton_support import ALIGNMENT

COMPILED_FOR: dict[tuple[int, ...], int] = {}
"""Slots of pools with gaps, by strides."""


def gated_delta_rule_mtp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float,
    output: Tensor,
    intermediate_states_buffer: Tensor,
    disable_state_update: bool,
    use_qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:
    """States behind every token go into rows by batch; of a negative index neither these nor outputs are written.

    A slot is found by the strides of the pool alone. The number of slots of one with gaps is compiled in, once for all
    pools with its strides; with indices of 32 bits addresses have as many.
    """
    (batch, steps, heads, key_dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    assert batch > 0
    assert steps > 1
    assert key_dim == value_dim == 128
    assert initial_state.shape[1:] == (value_heads, value_dim, key_dim)
    assert initial_state_indices.shape == (batch,)
    assert initial_state_indices.dtype == torch.int64
    if not initial_state.is_contiguous():
        assert len(initial_state) == COMPILED_FOR.setdefault(initial_state.stride(), len(initial_state))
    assert {x.dtype for x in (q, k, v, a, b, output)} == {torch.bfloat16}
    assert {x.dtype for x in (initial_state, A_log, dt_bias, intermediate_states_buffer)} == {torch.float32}
    # Rows of a buffer with more steps than tokens would not begin where one expects them to.
    assert intermediate_states_buffer.shape[1] == steps
    assert len(intermediate_states_buffer) >= batch
    assert intermediate_states_buffer.is_contiguous()
    assert intermediate_states_buffer[:batch].numel() < 1 << 31
    for tensor in (q, k, v, output, initial_state_indices, initial_state, intermediate_states_buffer):
        assert tensor.data_ptr() % ALIGNMENT == 0
    assert disable_state_update
    assert use_qk_l2norm

    group = value_heads // heads
    queries = (l2_norm(q.float()) * scale).repeat_interleave(group, dim=2)
    keys = l2_norm(k.float()).repeat_interleave(group, dim=2)
    g, beta = gating(a.float(), b.float(), A_log, dt_bias)
    for n, index in enumerate(initial_state_indices.tolist()):
        if index < 0:
            continue
        state = initial_state.as_strided((index + 1, *initial_state.shape[1:]), initial_state.stride())[index]
        for t in range(steps):
            o, state = recurrence(queries[n, t], keys[n, t], v[n, t].float(), g[n, t], beta[n, t], state)
            output[n, t], intermediate_states_buffer[n, t] = o, state
    return output, initial_state


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Let the stand-in serve, on any device."""
    library: Any = ModuleType("flashinfer.gdn_decode")
    library.gated_delta_rule_mtp = gated_delta_rule_mtp
    patch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    patch.setitem(sys.modules, "flashinfer.gdn_decode", library)
    patch.setattr(FlashInferGatedDeltaRule, "supports", lambda self, device, dtype: None)
