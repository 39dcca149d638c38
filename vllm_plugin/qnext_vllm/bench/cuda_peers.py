"""vLLM's own operations on a GPU, called as its in-tree Qwen3-Next calls them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.fused_moe import fused_experts, fused_topk
from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from vllm.third_party.flash_linear_attention.ops import (
    chunk_gated_delta_rule,
    fused_post_conv_prep,
    fused_sigmoid_gating_delta_rule_update,
)
from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

from qnext_plugins.cli.bench.inputs import PerTensor
from qnext_vllm.bench.inductor_peers import InductorPeers


def _prefill_metadata(starts: Tensor) -> SimpleNamespace:
    """What ``causal_conv1d_fn`` reads of the metadata that vLLM builds for a step with prefills."""
    nums_dict, batch_ptr, offsets = compute_causal_conv1d_metadata(starts.cpu(), device=starts.device)
    return SimpleNamespace(nums_dict=nums_dict, batch_ptr=batch_ptr, token_chunk_offset_ptr=offsets)


class Convolution:
    """The causal convolution over ``pool`` [slots, state_len, channels]."""

    def __init__(self, weight: Tensor, pool: Tensor) -> None:
        self.weight, self.state = weight, pool.transpose(1, 2)
        # A decode writes its result over its input, which the others still need.
        self._own = PerTensor(lambda x: x.clone())
        # An engine makes it once a step, for all layers.
        self._batch = PerTensor(_prefill_metadata)

    @staticmethod
    def name(call: Callable[[], Any]) -> str:
        return "causal_conv1d"

    def convolve(self, x: Tensor, slots: Tensor, starts: Tensor | None, speculation: bool) -> Tensor:
        """Prefill sequences that begin at ``starts`` [N + 1], or decode one token each where that is None."""
        if starts is None:
            return causal_conv1d_update(
                self._own(x), self.state, self.weight, None, "silu", conv_state_indices=slots, validate_data=False
            )
        return causal_conv1d_fn(
            x.transpose(0, 1),
            self.weight,
            None,
            self.state,
            starts,
            cache_indices=slots,
            has_initial_state=torch.zeros(len(slots), dtype=torch.bool, device=x.device),
            activation="silu",
            metadata=self._batch(starts),
        ).transpose(0, 1)

    def verify(self, x: Tensor, slots: Tensor, starts: Tensor, accepted: Tensor) -> Tensor:
        """Convolve the last accepted token and the drafts of each sequence; ``slots`` [N, 1]."""
        return causal_conv1d_update(
            self._own(x),
            self.state,
            self.weight,
            None,
            "silu",
            conv_state_indices=slots[:, 0],
            num_accepted_tokens=accepted,
            query_start_loc=starts,
            max_query_len=x.shape[0] // len(slots),
            validate_data=False,
        )


class DeltaRule:
    """The delta rule over ``state`` [slots, HV, V, K]."""

    key_first = False
    names: ClassVar = {
        "prefill": "chunk_gated_delta_rule",
        "decode": "fused_sigmoid_gating_delta_rule_update",
        "verify": "fused_sigmoid_gating_delta_rule_update",
    }

    def __init__(self, heads: tuple[int, int, int]) -> None:
        self.key_heads, self.value_heads, self.dim = heads

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
        """The chunked form, from zero states."""
        prepared = fused_post_conv_prep(
            conv_output=convolved,
            a=a,
            b=b,
            A_log=A_log,
            dt_bias=dt_bias,
            num_k_heads=self.key_heads,
            head_k_dim=self.dim,
            head_v_dim=self.dim,
            apply_l2norm=True,
            output_g_exp=False,
        )
        out, final = chunk_gated_delta_rule(
            *(each.unsqueeze(0) for each in prepared),
            initial_state=torch.zeros_like(state[: len(slots)]),
            output_final_state=True,
            cu_seqlens=starts,
            use_qk_l2norm_in_kernel=False,
        )
        state[slots] = final.to(state.dtype)
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
        """One token a sequence."""
        return self._update(convolved, a, b, A_log, dt_bias, state, slots, starts, None)

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
        """A few tokens a sequence; the state behind token t goes to ``slots[:, t]``."""
        return self._update(convolved, a, b, A_log, dt_bias, state, slots, starts, accepted)

    def _update(
        self,
        convolved: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        slots: Tensor,
        starts: Tensor,
        accepted: Tensor | None,
    ) -> Tensor:
        sizes = [self.key_heads * self.dim] * 2 + [self.value_heads * self.dim]
        q, k, v = (part.unflatten(1, (-1, self.dim))[None].contiguous() for part in convolved.split(sizes, dim=1))
        out, _ = fused_sigmoid_gating_delta_rule_update(
            A_log=A_log,
            a=a,
            b=b,
            dt_bias=dt_bias,
            q=q,
            k=k,
            v=v,
            initial_state=state,
            inplace_final_state=True,
            cu_seqlens=starts,
            ssm_state_indices=slots,
            num_accepted_tokens=accepted,
            use_qk_l2norm_in_kernel=True,
        )
        return out.squeeze(0)


class CudaPeers(InductorPeers):
    """vLLM on a GPU: all but its attention, which wants an engine."""

    def experts(self, w13: Tensor, w2: Tensor) -> tuple[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]:
        return "fused_experts", lambda out, x, weights, ids: fused_experts(x, w13, w2, weights, ids)

    def experts_fp8(
        self, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor
    ) -> tuple[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]:
        settings = fp8_w8a8_moe_quant_config(w13_scale, w2_scale, block_shape=[128, 128])
        return "fused_experts (fp8)", lambda out, x, weights, ids: fused_experts(
            x, w13, w2, weights, ids, quant_config=settings
        )

    def topk_softmax(self, top_k: int) -> tuple[str, Callable[..., Any]]:
        return "fused_topk", lambda logits: fused_topk(logits, logits, top_k, renormalize=True)[:2]

    def linear(self, weight: Tensor) -> tuple[str, Callable[[Tensor], Tensor]]:
        return "F.linear (cuBLAS)", lambda x: functional.linear(x, weight)

    def convolution(self, weight: Tensor, pool: Tensor, heads: tuple[int, int, int]) -> Convolution:
        return Convolution(weight, pool)

    def delta_rule(self, heads: tuple[int, int, int]) -> DeltaRule:
        return DeltaRule(heads)
