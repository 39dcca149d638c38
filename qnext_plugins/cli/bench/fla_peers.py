"""The delta rule of flash-linear-attention (``fla-core``) as a peer on GPUs."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from qnext_plugins.cli.bench.inputs import Library

DISTRIBUTIONS = ("fla-core", "flash-linear-attention")


class DeltaRule:
    """Over ``state`` [slots, HV, K, V]; states are gathered and scattered, which its interface asks for."""

    key_first = True
    names: ClassVar = {"prefill": "chunk_gated_delta_rule", "decode": "fused_recurrent_gated_delta_rule"}

    def __init__(self, heads: tuple[int, int, int]) -> None:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

        self.key_heads, self.value_heads, self.dim = heads
        self._chunk, self._recurrent = chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    def prefill(
        self,
        convolved: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        slots: Tensor,
        starts: Tensor,
    ) -> Tensor:
        """From zero states."""
        inputs = self._inputs(convolved, a, b, A_log, dt_bias)
        return self._run(self._chunk, inputs, torch.zeros_like(state[slots]), state, slots, starts)

    def decode(
        self,
        convolved: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        slots: Tensor,
        starts: Tensor,
    ) -> Tensor:
        """One token a sequence."""
        inputs = self._inputs(convolved, a, b, A_log, dt_bias)
        return self._run(self._recurrent, inputs, state[slots], state, slots, starts)

    def _inputs(
        self, convolved: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, g and beta [1, T, heads, …]; every value head with a key head of its own."""
        sizes = [self.key_heads * self.dim] * 2 + [self.value_heads * self.dim]
        q, k, v = (part.unflatten(1, (-1, self.dim))[None] for part in convolved.split(sizes, dim=1))
        q, k = (each.repeat_interleave(self.value_heads // self.key_heads, dim=2) for each in (q, k))
        g = -A_log.float().exp() * functional.softplus(a.float() + dt_bias.float())
        return q, k, v.contiguous(), g[None], torch.sigmoid(b.float())[None]

    @staticmethod
    def _run(function: Any, inputs: tuple, initial: Tensor, state: Tensor, slots: Tensor, starts: Tensor) -> Tensor:
        out, final = function(
            *inputs,
            initial_state=initial,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=starts.long(),
        )
        state[slots] = final.to(state.dtype)
        return out.squeeze(0)


class FlaPeers(Library):
    """flash-linear-attention on a GPU."""

    name = "fla"

    def __init__(self, version: str) -> None:
        self.version = version

    def delta_rule(self, heads: tuple[int, int, int]) -> DeltaRule:
        return DeltaRule(heads)


def peers(device: str) -> Library | str:
    """Its kernels for a device type, or the reason why there are none."""
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed here"
    if device != "cuda":
        return f"its kernels run on GPUs, not on {device}"
    for name in DISTRIBUTIONS:
        try:
            return FlaPeers(version(name))
        except PackageNotFoundError:
            continue
    return "no distribution is called " + " or ".join(DISTRIBUTIONS)
