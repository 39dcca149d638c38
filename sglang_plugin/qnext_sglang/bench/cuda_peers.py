"""SGLang's Triton kernels of Gated DeltaNet on a GPU, called as its backend of linear attention calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from sglang.kernels.ops.attention.fla.chunk import chunk_gated_delta_rule
from sglang.kernels.ops.attention.fla.fused_recurrent import fused_recurrent_gated_delta_rule_packed_decode
from sglang.kernels.ops.attention.fla.layernorm_gated import rms_norm_gated
from sglang.kernels.ops.attention.linear.fused_gdn_gating import fused_gdn_gating
from sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent import fused_sigmoid_gating_delta_rule_update
from sglang.kernels.ops.mamba.causal_conv1d_triton import causal_conv1d_fn, causal_conv1d_update
from torch import Tensor

from qnext_plugins.cli.bench.delta_rule_inputs import Heads, heads_apart
from qnext_plugins.cli.bench.inputs import Library, PerTensor


class Convolution:
    """The causal convolution over ``pool`` [slots, state_len, channels]; a verify keeps its states elsewhere."""

    def __init__(self, weight: Tensor, pool: Tensor) -> None:
        self.weight, self.state = weight, pool.transpose(1, 2)
        self._lengths = PerTensor(lambda starts: starts.diff().tolist())

    @staticmethod
    def name(call: Callable[[], Any]) -> str:
        return "causal_conv1d"

    def convolve(self, x: Tensor, slots: Tensor, starts: Tensor | None, speculation: bool) -> Tensor:
        """Prefill sequences that begin at ``starts`` [N + 1], or decode one token each where that is None."""
        if starts is None:
            return causal_conv1d_update(x, self.state, self.weight, None, "silu", conv_state_indices=slots)
        return causal_conv1d_fn(
            x.transpose(0, 1),
            self.weight,
            None,
            conv_states=self.state[..., : self.weight.shape[1] - 1],
            query_start_loc=starts,
            seq_lens_cpu=self._lengths(starts),
            cache_indices=slots,
            has_initial_state=torch.zeros(len(slots), dtype=torch.bool, device=x.device),
            activation="silu",
        ).transpose(0, 1)


class DeltaRule:
    """The delta rule over ``state`` [slots, HV, V, K]."""

    key_first = False
    names: ClassVar = {
        "prefill": "chunk_gated_delta_rule",
        "decode": "fused_recurrent_gated_delta_rule_packed_decode",
        "verify": "fused_sigmoid_gating_delta_rule_update",
    }

    def __init__(self, heads: Heads) -> None:
        self.heads = heads

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
        """The chunked form, from zero states, which are written to their slots before."""
        q, k, v = heads_apart(convolved, self.heads)
        g, beta = fused_gdn_gating(A_log, a, b, dt_bias)
        state[slots] = 0
        out, *_ = chunk_gated_delta_rule(
            q=q[None],
            k=k[None],
            v=v[None],
            g=g,
            beta=beta,
            initial_state=state,
            initial_state_indices=slots,
            cu_seqlens=starts,
            use_qk_l2norm_in_kernel=True,
        )
        return out.squeeze(0)

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
        """One token a sequence, gates and split in the kernel."""
        _, value_heads, dim = self.heads
        out = convolved.new_empty(len(convolved), 1, value_heads, dim)
        fused_recurrent_gated_delta_rule_packed_decode(
            mixed_qkv=convolved,
            a=a,
            b=b,
            A_log=A_log,
            dt_bias=dt_bias,
            scale=dim**-0.5,
            initial_state=state,
            out=out,
            ssm_state_indices=slots,
            use_qk_l2norm_in_kernel=True,
        )
        return out.squeeze(1)

    def verify(
        self,
        convolved: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        slots: Tensor,
        starts: Tensor,
        accepted: Tensor,
    ) -> Tensor:
        """A few tokens a sequence; SGLang's buffer of steps are the slots from 1 on, which must be in order."""
        tokens = slots.shape[1]
        q, k, v = heads_apart(convolved, self.heads)
        out = fused_sigmoid_gating_delta_rule_update(
            A_log=A_log,
            dt_bias=dt_bias,
            q=q[None],
            k=k[None],
            v=v[None],
            a=a,
            b=b,
            initial_state_source=state,
            initial_state_indices=slots.gather(1, accepted[:, None].long() - 1).squeeze(1),
            cu_seqlens=starts,
            use_qk_l2norm_in_kernel=True,
            softplus_beta=1.0,
            softplus_threshold=20.0,
            disable_state_update=True,
            intermediate_states_buffer=state[1:].unflatten(0, (-1, tokens)),
            intermediate_state_indices=(slots[:, 0] - 1) // tokens,
            cache_steps=tokens,
        )
        return out.squeeze(0)


class CudaPeers(Library):
    """SGLang on a GPU: Gated DeltaNet; its experts and attention want an engine."""

    name = "sglang"

    def __init__(self, version: str) -> None:
        self.version = version

    def convolution(self, weight: Tensor, pool: Tensor, heads: Heads) -> Convolution:
        return Convolution(weight, pool)

    def delta_rule(self, heads: Heads) -> DeltaRule:
        return DeltaRule(heads)

    def gated_rms_norm(self, weight: Tensor, eps: float) -> tuple[str, Callable[..., Any]]:
        def run(x: Tensor, z: Tensor) -> Tensor:
            return rms_norm_gated(x=x, weight=weight, bias=None, z=z, eps=eps, is_rms_norm=True)

        return "rms_norm_gated", run
