#!/usr/bin/env python3
"""The gated delta rule called by hand: two sequences are prefilled, then each decodes a token."""

import torch
from torch import Tensor

from qnext_kernels import gated_delta_rule_decode, gated_delta_rule_prefill, selected_backends

H, HV, K, V = 16, 32, 128, 128  # key heads, value heads and their dimensions in Qwen3-Next-80B-A3B
A_log, dt_bias = torch.zeros(HV), torch.zeros(HV)
state = torch.zeros(8, HV, V, K)  # a pool of eight slots; kernels write in place
slots = torch.tensor([5, 2])  # where the two sequences live


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random q and k [tokens, H, K], v [tokens, HV, V], a and b [tokens, HV]."""
    shapes = ((H, K), (H, K), (HV, V), (HV,), (HV,))
    q, k, v, a, b = (torch.randn(tokens, *shape) for shape in shapes)
    return q, k, v, a, b


starts, known = torch.tensor([0, 100, 164]), torch.tensor([False, False])  # 100 and 64 tokens, both new
out = gated_delta_rule_prefill(*inputs(164), A_log, dt_bias, state, slots, starts, known)
one = gated_delta_rule_decode(*inputs(2), A_log, dt_bias, state, slots)

backend = selected_backends(state.device, out.dtype)["gated_delta_rule"]
print(f"backend {backend}: prefilled {tuple(out.shape)}, decoded {tuple(one.shape)}")
print(f"slots written: {sorted(state.flatten(1).any(1).nonzero().flatten().tolist())}")
