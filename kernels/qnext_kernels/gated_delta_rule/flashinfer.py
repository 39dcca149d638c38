"""The gated delta rule in FlashInfer: ``chunk_gated_delta_rule``, decode in the pool, ``gated_delta_rule_mtp``."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import Call
from qnext_kernels.flashinfer_support import FlashInferBackend
from qnext_kernels.gated_delta_rule.packed_prefill import packed_prefill
from qnext_kernels.gated_delta_rule.padded_verify import padded_verify
from qnext_kernels.triton_support import aligned_rows

HEAD_DIM = 128
SMALLEST_DECAY = 1e-30
"""A token that forgets more than float32 can tell still has a finite logarithm, which the kernels take."""


class FlashInferGatedDeltaRule(FlashInferBackend):
    """States in float32 and head dimensions of 128; q and k are rounded once more behind their norm in a prefill.

    It keeps slots, padding and the layout of states, but not the bitwise promises: a prefill that is split, or decoded
    on, has not the bits of one that is not. In a verify a + dt_bias above 88 may give NaN: the kernel's exponential
    overflows.
    """

    def supports_call(self, device: torch.device, dtype: torch.dtype, call: Call) -> str | None:
        _, _, key_dim, value_dim = call.shape
        state_dtype, gate_dtype = call.dtypes
        if missing := [feature for feature in call.features if feature != "step pool"]:
            return f"has no {' and no '.join(missing)}"
        if (key_dim, value_dim) != (HEAD_DIM, HEAD_DIM):
            return f"needs head dimensions of {HEAD_DIM} and {HEAD_DIM}, got {key_dim} and {value_dim}"
        if call.method != "prefill":
            if state_dtype != torch.float32:
                return f"uses slot 0 for padding unless states are in torch.float32, got {state_dtype}"
            if dtype != torch.bfloat16:
                return f"decodes and verifies in torch.bfloat16, got {dtype}"
            if gate_dtype != torch.bfloat16:
                return f"needs a and b in torch.bfloat16, got {gate_dtype}"
            return None
        if state_dtype != torch.float32:
            return f"rounds states at the end of a call alone: needs them in torch.float32, got {state_dtype}"
        return _why_no_prefill(device.index)

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
        from flashinfer.gdn_prefill import chunk_gated_delta_rule

        def chunked(
            q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor, query_start_loc: Tensor
        ) -> tuple[Tensor, Tensor]:
            out, final = chunk_gated_delta_rule(
                q=q,
                k=k,
                v=v,
                g=decay(g),
                beta=beta,
                scale=q.shape[2] ** -0.5,
                initial_state=initial,
                output_final_state=True,
                cu_seqlens=query_start_loc,
                use_qk_l2norm_in_kernel=False,  # which some versions do not do
                output=torch.empty_like(v),
                output_state=torch.empty_like(initial),
            )
            return out, final

        tokens = q, k, v, a, b, A_log, dt_bias
        return packed_prefill(chunked, *tokens, state, slots, query_start_loc, has_initial)

    def decode(
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
    ) -> Tensor:
        from flashinfer.gdn_decode import gated_delta_rule_decode_pretranspose

        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        if v.numel() == 0:
            return out
        q, k, v, a, b = one_token_each(q, k, v, a, b)
        with torch.cuda.device_of(v):
            gated_delta_rule_decode_pretranspose(
                q=q,
                k=k,
                v=v,
                state=None,
                A_log=aligned_rows(A_log.float()),
                a=a,
                dt_bias=aligned_rows(dt_bias.float()),
                b=b,
                scale=q.shape[3] ** -0.5,
                output=out[:, None],
                use_qk_l2norm=True,
                initial_state=state,
                initial_state_indices=aligned_rows(slots.int()),
                backend="flashinfer",  # "auto" may take a kernel that does not say what it does with slot −1
            )
        return out

    def verify(
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
        accepted: Tensor,
        steps: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        from flashinfer.gdn_decode import gated_delta_rule_mtp

        gates = aligned_rows(A_log.float()), aligned_rows(dt_bias.float())
        # A pool with gaps has its number of slots compiled in, which nothing reads: two, whatever there are.
        pool = state if state.is_contiguous() else state[:2]

        def by_batch(
            q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, initial: Tensor, out: Tensor, states: Tensor
        ) -> None:
            gated_delta_rule_mtp(
                q=q,
                k=k,
                v=v,
                initial_state=pool,
                initial_state_indices=initial,
                A_log=gates[0],
                a=a,
                dt_bias=gates[1],
                b=b,
                scale=q.shape[3] ** -0.5,
                output=out,
                # Into slots of the pool it would write by itself, but for slot −1 in front of the pool.
                intermediate_states_buffer=states,
                disable_state_update=True,
                use_qk_l2norm=True,
            )

        return padded_verify(by_batch, q, k, v, a, b, state, slots, query_start_loc, accepted, steps)


def _why_no_prefill(index: int | None) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    cuda = int((torch.version.cuda or "0").partition(".")[0])
    if major == 10 and cuda < 13:
        return f"needs CUDA 13 for a prefill on compute capability {major}.{minor}, got {torch.version.cuda}"
    return None if major in (9, 10, 12) else f"has no prefill for compute capability {major}.{minor}"


def decay(g: Tensor) -> Tensor:
    """exp(g), as ``chunk_gated_delta_rule`` wants it: not its logarithm, and never zero."""
    return torch.exp(g).clamp(min=SMALLEST_DECAY)


def one_token_each(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Tokens [N, …] as sequences of one token [N, 1, …]: views where rows have unit stride and an aligned address."""
    return tuple(aligned_rows(x)[:, None] for x in (q, k, v, a, b))
