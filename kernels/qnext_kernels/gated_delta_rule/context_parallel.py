"""The gated delta rule in Triton, the segments of a prefill's sequences beside each other."""

from __future__ import annotations

from typing import Any

import torch

from qnext_kernels.dispatch import Call
from qnext_kernels.gated_delta_rule.triton import TritonGatedDeltaRule

LARGEST_KEY_DIM = 128
"""A product of two matrices of key dim × key dim lies in shared memory whole."""


class TritonContextParallel(TritonGatedDeltaRule):
    """For prefills of long sequences, where these and their value heads are few; decode and verify are those of Triton.

    A prefill does 2.25 times the operations in many times the programs: it pays where those of the serial walk, one
    for 16 value dimensions of a head of a sequence, leave multiprocessors idle.

    All promises hold but one: only at multiples of 512 tokens has a split prefill the bits of the unsplit one; split
    at other multiples of CHUNK_SIZE it agrees to rounding. The deterministic mode does without it.
    """

    name = "triton_context_parallel"
    batch_invariant = False

    def supports_call(self, device: torch.device, dtype: torch.dtype, call: Call) -> str | None:
        _, _, key_dim, _ = call.shape
        if call.method == "prefill" and key_dim > LARGEST_KEY_DIM:
            return f"needs a key dimension of at most {LARGEST_KEY_DIM}, got {key_dim}"
        return None

    def run_chunks(self, *batch: Any) -> None:
        from qnext_kernels.gated_delta_rule.triton_segments import run_segments

        run_segments(*batch)
