"""Delta rule, norms and SwiGLU of FlashInfer (``flashinfer-python``) as peers on GPUs; it compiles on first use."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor

from qnext_plugins.cli.bench.delta_rule_inputs import Heads, gates, heads_apart
from qnext_plugins.cli.bench.inputs import Library, PerTensor


class DeltaRule:
    """Over ``state`` [slots, HV, V, K] in float32."""

    key_first = False
    names: ClassVar = {
        "prefill": "chunk_gated_delta_rule",
        "decode": "gated_delta_rule_decode_pretranspose",
        "verify": "gated_delta_rule_mtp",
    }

    def __init__(self, heads: Heads) -> None:
        from flashinfer.gdn_decode import gated_delta_rule_decode_pretranspose, gated_delta_rule_mtp
        from flashinfer.gdn_prefill import chunk_gated_delta_rule

        self.heads = heads
        self._chunk, self._decode = chunk_gated_delta_rule, gated_delta_rule_decode_pretranspose
        self._mtp = gated_delta_rule_mtp

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
        """From zero states; its decay is not a logarithm."""
        q, k, v = heads_apart(convolved, self.heads)
        g, beta = gates(a, b, A_log, dt_bias)
        out, final = self._chunk(
            q,
            k,
            v,
            g=g.exp(),
            beta=beta,
            output_final_state=True,
            cu_seqlens=starts,
            use_qk_l2norm_in_kernel=True,
            output_state=torch.empty((len(slots), *state.shape[1:]), dtype=state.dtype, device=state.device),
        )
        state[slots] = final
        return out

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
        q, k, v = heads_apart(convolved, self.heads)
        out, _ = self._decode(
            *(x[:, None] for x in (q, k, v)),
            state=None,
            A_log=A_log,
            a=a[:, None],
            dt_bias=dt_bias,
            b=b[:, None],
            initial_state=state,
            initial_state_indices=slots,
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
        """A few tokens a sequence; the state behind token t goes to ``slots[:, t]``."""
        by_sequence = (len(slots), -1)
        q, k, v = heads_apart(convolved, self.heads)
        out, _ = self._mtp(
            *(x.unflatten(0, by_sequence) for x in (q, k, v)),
            initial_state=state,
            initial_state_indices=slots.gather(1, accepted[:, None].long() - 1).squeeze(1),
            A_log=A_log,
            a=a.unflatten(0, by_sequence),
            dt_bias=dt_bias,
            b=b.unflatten(0, by_sequence),
            ssm_state_indices=slots,
            disable_state_update=False,
        )
        return out.flatten(0, 1)


class FlashInferPeers(Library):
    """FlashInfer on a GPU."""

    name = "flashinfer"
    compiled_by_triton = False

    def __init__(self, version: str) -> None:
        self.version = version

    def delta_rule(self, heads: Heads) -> DeltaRule:
        return DeltaRule(heads)

    def rms_norm(self, weight: Tensor, eps: float) -> tuple[str, Callable[..., Any]]:
        from flashinfer.norm import gemma_fused_add_rmsnorm

        # It writes both results over its inputs, which the others still need.
        own = PerTensor(lambda tensor: tensor.clone())

        def run(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            results = own(x), own(residual)
            gemma_fused_add_rmsnorm(*results, weight, eps)
            return results

        return "gemma_fused_add_rmsnorm", run

    def silu_and_mul(self) -> tuple[str, Callable[..., Any]]:
        from flashinfer.activation import silu_and_mul

        return "silu_and_mul", silu_and_mul


def peers(device: str) -> Library | str:
    """Its kernels for a device type, or the reason why there are none."""
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer-python is not installed here"
    if device != "cuda":
        return f"its kernels run on NVIDIA GPUs, not on {device}"
    return FlashInferPeers(version("flashinfer-python"))
