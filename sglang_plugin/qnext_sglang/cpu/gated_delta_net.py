"""What SGLang's base classes of the Gated DeltaNet backend do with Triton kernels, without them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qnext_kernels import use_huge_pages
from qnext_kernels.memory import SECONDS_FOR_HUGE_PAGES
from qnext_sglang import sglang_api as api
from qnext_sglang.gated_delta_net import GatedDeltaNetBackend


class CpuGatedDeltaNetBackend(GatedDeltaNetBackend):
    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        states = self.req_to_token_pool.mamba_pool.mamba_cache
        use_huge_pages(*states.conv, states.temporal, seconds=SECONDS_FOR_HUGE_PAGES)

    def _track_mamba_state_decode(
        self, forward_batch: Any, conv_states: Tensor, ssm_states: Tensor, cache_indices: Tensor, layer_id: Any = None
    ) -> None:
        """Copy the states of the sequences whose prefix is to be cached at this token."""
        if forward_batch.mamba_track_mask is None:
            return
        tracked = forward_batch.mamba_track_mask[: forward_batch.batch_size].nonzero().squeeze(1)
        source = cache_indices[tracked].long()
        target = self.forward_metadata.mamba_track_indices[tracked].long()
        for pool in (conv_states, ssm_states):
            pool[target] = pool[source]


class CpuHybridBackend(api.HybridLinearAttnBackend):
    def update_mamba_state_after_mtp_verify(
        self,
        last_correct_step_indices: Tensor,
        mamba_track_indices: Tensor | None,
        mamba_steps_to_track: Tensor | None,
        model: Any,
        req_pool_indices: Tensor | None = None,
    ) -> None:
        """Commit the state behind each sequence's last accepted token, and those that the prefix cache keeps."""
        linear, count = self.linear_attn_backend, len(last_correct_step_indices)
        slots, rows = linear.forward_metadata.mamba_cache_indices[:count], linear.verify_rows[:count]
        caches = linear.req_to_token_pool.get_speculative_mamba2_params_all_layers()
        for pool, steps in (
            (caches.temporal, caches.intermediate_ssm),
            (caches.conv[0], caches.intermediate_conv_window[0]),
        ):
            self._scatter_speculative_state_with_mask(pool, steps, slots, last_correct_step_indices, rows)
            if mamba_track_indices is not None:
                self._scatter_speculative_state_with_mask(pool, steps, mamba_track_indices, mamba_steps_to_track, rows)
