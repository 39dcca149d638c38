"""Delta rule and gated norm of flash-linear-attention (``fla-core``) as peers on GPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

from torch import Tensor

from qnext_plugins.cli.bench.delta_rule_inputs import Heads, heads_apart, starts_in_int64
from qnext_plugins.cli.bench.inputs import Library

DISTRIBUTIONS = ("fla-core", "flash-linear-attention")


class DeltaRule:
    """Over ``state`` [slots, HV, V, K]; states are gathered and scattered, which its interface asks for."""

    key_first = False
    names: ClassVar = {"prefill": "chunk_gated_delta_rule", "decode": "fused_recurrent_gated_delta_rule"}

    def __init__(self, heads: Heads) -> None:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

        self.heads = heads
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
        return self._run(self._chunk, convolved, a, b, A_log, dt_bias, None, state, slots, starts)

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
        return self._run(self._recurrent, convolved, a, b, A_log, dt_bias, state[slots], state, slots, starts)

    def _run(
        self,
        function: Any,
        convolved: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        initial: Tensor | None,
        state: Tensor,
        slots: Tensor,
        starts: Tensor,
    ) -> Tensor:
        q, k, v = heads_apart(convolved, self.heads)
        out, final = function(
            q[None],
            k[None],
            v[None],
            g=a[None],
            beta=b[None],
            initial_state=initial,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            A_log=A_log,
            dt_bias=dt_bias,
            use_beta_sigmoid_in_kernel=True,
            state_v_first=True,
            cu_seqlens=starts_in_int64(starts),
        )
        state[slots] = final.to(state.dtype)
        return out.squeeze(0)


class FlaPeers(Library):
    """flash-linear-attention on a GPU."""

    name = "fla"

    def __init__(self, version: str) -> None:
        self.version = version

    def delta_rule(self, heads: Heads) -> DeltaRule:
        return DeltaRule(heads)

    def gated_rms_norm(self, weight: Tensor, eps: float) -> tuple[str, Callable[..., Any]]:
        from fla.modules.norm.fused_norm_gate import rms_norm_gated

        return "rms_norm_gated", lambda x, z: rms_norm_gated(x, z, weight, None, eps=eps)


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
