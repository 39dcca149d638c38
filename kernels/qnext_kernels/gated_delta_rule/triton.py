"""The gated delta rule in Triton: one launch for decode and for verify, three for a prefill.

In the deterministic mode a prefill is one launch, token by token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext_kernels.dispatch import is_deterministic
from qnext_kernels.triton_support import TritonBackend, aligned_rows, rows


class TritonGatedDeltaRule(TritonBackend):
    """Gates, sums and states in float32; chunks multiply matrices in bfloat16, in tf32 or as exactly as float32.

    Which of the three follows the activations: bfloat16, float16 or float32.

    A prefill runs by chunks, and its last chunk token by token where it has at most RECURRENT_TOKENS: with the bits of
    decode and verify, as on a CPU. The promises of the operation hold because everything token by token sums in one
    order, block sizes never depend on the batch, and the state is rounded behind every chunk as a split prefill rounds
    it. In the deterministic mode a whole prefill runs token by token, so that a cut anywhere changes no bit.

    Nothing is read on the host and every grid follows from shapes, so that a CUDA graph can capture each call. A graph
    pads its batch: tokens behind the last sequence have zero outputs in a verify, and undefined ones in a prefill,
    which no graph captures. Pools must be contiguous within a slot.

    The tests compile it for GPUs of NVIDIA and AMD, run it in Triton's interpreter, and on a GPU where there is one.
    """

    batch_invariant = True

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
        snapshots: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        from qnext_kernels.gated_delta_rule.triton_recurrent import run_recurrent
        from qnext_kernels.gated_delta_rule.triton_walk import run_walk

        expect_contiguous_slots("state", state, 1)
        tokens = *map(aligned_rows, (q, k, v)), rows(a), rows(b), A_log.contiguous(), dt_bias.contiguous()
        slots, query_start_loc, has_initial = slots.contiguous(), query_start_loc.contiguous(), has_initial.contiguous()
        if snapshots is not None:
            snapshots = snapshots[0].contiguous(), snapshots[1].contiguous()
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        with torch.cuda.device_of(v):
            if is_deterministic():
                run_walk(tokens, out, state, slots, query_start_loc, has_initial, snapshots)
                return out
            self.run_chunks(tokens, out, state, slots, query_start_loc, has_initial, snapshots)
            run_recurrent(tokens, out, state, slots, query_start_loc, has_initial=has_initial)
        return out

    def run_chunks(self, *batch: Any) -> None:
        """All of a prefill but last chunks of at most RECURRENT_TOKENS; arguments as of ``run_chunked``."""
        from qnext_kernels.gated_delta_rule.triton_state import run_chunked

        run_chunked(*batch)

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
        from qnext_kernels.gated_delta_rule.triton_recurrent import run_recurrent

        expect_contiguous_slots("state", state, 1)
        if steps is not None:
            expect_contiguous_slots("step_state", steps[0], 2)
            steps = steps[0], steps[1].contiguous()
        tokens = *map(rows, (q, k, v, a, b)), A_log.contiguous(), dt_bias.contiguous()
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        with torch.cuda.device_of(v):
            where = query_start_loc.contiguous(), accepted.contiguous()
            run_recurrent(tokens, out, state, slots.contiguous(), *where, steps)
        return out

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
        from qnext_kernels.gated_delta_rule.triton_recurrent import run_recurrent

        expect_contiguous_slots("state", state, 1)
        tokens = *map(rows, (q, k, v, a, b)), A_log.contiguous(), dt_bias.contiguous()
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        with torch.cuda.device_of(v):
            run_recurrent(tokens, out, state, slots.contiguous())
        return out


def expect_contiguous_slots(name: str, pool: Tensor, leading: int) -> None:
    """Raise ValueError unless what lies behind the first ``leading`` dimensions of a pool is contiguous."""
    shape, strides = pool.shape[leading:], pool.stride()[leading:]
    _, value_dim, key_dim = shape
    expected = (value_dim * key_dim, key_dim, 1)
    if strides == expected:
        return
    if any(size > 1 and ours != want for size, ours, want in zip(shape, strides, expected, strict=True)):
        raise ValueError(f"{name}: expected slots with strides {list(expected)}, got {list(strides)}")
