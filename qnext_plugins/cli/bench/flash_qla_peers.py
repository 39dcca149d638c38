"""The chunked delta rule of FlashQLA (``flash-qla``) as a peer on GPUs from Hopper on."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from typing import ClassVar

from torch import Tensor

from qnext_plugins.cli.bench.delta_rule_inputs import Heads, gates, heads_apart, starts_in_int64
from qnext_plugins.cli.bench.inputs import Library


class DeltaRule:
    """Over ``state`` [slots, HV, V, K]; it has a prefill alone."""

    key_first = False
    names: ClassVar = {"prefill": "chunk_gated_delta_rule"}

    def __init__(self, heads: Heads) -> None:
        from flash_qla import chunk_gated_delta_rule

        self.heads, self._chunk = heads, chunk_gated_delta_rule

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
        q, k, v = heads_apart(convolved, self.heads)
        g, beta = gates(a, b, A_log, dt_bias)
        out, final = self._chunk(
            q[None],
            k[None],
            v[None],
            g[None],
            beta[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=starts_in_int64(starts),
            state_v_first=True,
        )
        state[slots] = final.to(state.dtype)
        return out.squeeze(0)


class FlashQlaPeers(Library):
    """FlashQLA on a GPU."""

    name = "flash_qla"
    compiled_by_triton = False

    def __init__(self, version: str) -> None:
        self.version = version

    def delta_rule(self, heads: Heads) -> DeltaRule:
        return DeltaRule(heads)


def peers(device: str) -> Library | str:
    """Its kernels for a device type, or the reason why there are none."""
    if importlib.util.find_spec("flash_qla") is None:
        return "flash-qla is not installed here"
    if device != "cuda":
        return f"its kernels run on GPUs, not on {device}"
    return FlashQlaPeers(version("flash-qla"))
