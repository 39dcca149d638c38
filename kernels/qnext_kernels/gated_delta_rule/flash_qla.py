"""The gated delta rule's prefill in FlashQLA."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import Backend, Call
from qnext_kernels.flashinfer_support import why_missing
from qnext_kernels.gated_delta_rule.packed_prefill import packed_prefill

PACKAGE, MODULE = "flash-qla", "flash_qla"
VERSIONS = ("0.1.3", "0.2")
CAPABILITIES = ((9, 0), (10, 0), (10, 3), (12, 0), (12, 1))
HEAD_DIM = 128


class FlashQlaGatedDeltaRule(Backend):
    """Prefill alone: bfloat16 or float16, states in float32, head dimensions of 128.

    Each call waits for the GPU, several times: the library plans its chunks on the host, and takes no sequence without
    tokens. Not for a CUDA graph, and the bitwise promises are not its. Where heads are few it splits long sequences,
    and what a part takes over from the one before it leaves out what has decayed to e⁻¹⁰.
    """

    name = "flash_qla"
    devices = ("cuda",)
    dtypes = (torch.bfloat16, torch.float16)

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if (reason := super().supports(device, dtype)) is not None:
            return reason
        if dtype not in self.dtypes:
            return f"computes in {', '.join(map(str, self.dtypes))}, got {dtype}"
        return why_missing(PACKAGE, MODULE, VERSIONS) or _why_unsuitable(device.index)

    def supports_call(self, device: torch.device, dtype: torch.dtype, call: Call) -> str | None:
        _, _, key_dim, value_dim = call.shape
        if call.method != "prefill":
            return f"has no {call.method}"
        if call.features:
            return f"has no {' and no '.join(call.features)}"
        if (key_dim, value_dim) != (HEAD_DIM, HEAD_DIM):
            return f"needs head dimensions of {HEAD_DIM} and {HEAD_DIM}, got {key_dim} and {value_dim}"
        if call.dtypes[0] != torch.float32:
            return f"rounds states at the end of a call alone: needs them in torch.float32, got {call.dtypes[0]}"
        return None

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        slots: Tensor,
        query_start_loc: Tensor,
        has_initial: Tensor,
        snapshots: None = None,
    ) -> Tensor:
        from flash_qla import chunk_gated_delta_rule

        def chunked(
            q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor, query_start_loc: Tensor
        ) -> tuple[Tensor, Tensor]:
            filled, starts = without_empty(query_start_loc)
            out, final = chunk_gated_delta_rule(
                q=q[None],
                k=k[None],
                v=v[None],
                g=g[None],
                beta=beta[None],
                scale=q.shape[2] ** -0.5,
                initial_state=initial[filled],
                output_final_state=True,
                use_qk_l2norm_in_kernel=False,
                cu_seqlens=starts,
                state_v_first=True,
                auto_cp=True,
            )
            return out[0].contiguous(), initial.index_copy_(0, filled, final)

        tokens = q, k, v, a, b, A_log, dt_bias
        return packed_prefill(chunked, *tokens, state, slots, query_start_loc, has_initial)


def without_empty(query_start_loc: Tensor) -> tuple[Tensor, Tensor]:
    """Which of N sequences have tokens, and the offsets of those alone.

    The offsets are a new tensor: what the library plans for one, it keeps for that tensor, whatever is written to it.
    """
    filled = query_start_loc.diff().nonzero().squeeze(1)
    return filled, torch.cat([query_start_loc[:1], query_start_loc[1:][filled]])


def _why_unsuitable(index: int | None) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability in CAPABILITIES:
        return None
    expected = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
    return f"needs compute capability {expected}, got {capability[0]}.{capability[1]}"
