"""The definition of the convolution: one sequence at a time, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.causal_conv1d.grouping import ungrouped
from qnext_kernels.dispatch import Backend
from qnext_kernels.elementwise import silu


def convolve(window: Tensor, weight: Tensor) -> Tensor:
    """SiLU(Σ_w weight[d, w] · window[w, d]) of one token; window [W, D] and weight [D, W] of one float dtype → [D]."""
    total = window[0] * weight[:, 0]
    for w in range(1, weight.shape[1]):
        total = total + window[w] * weight[:, w]
    return silu(total)


class ReferenceBackend(Backend):
    """Readable PyTorch, in float32 (float64 for float64 inputs).

    ``snapshots`` are their slots and lengths, ``steps`` the step pool and its rows.
    """

    name = "reference"

    def prefill(
        self,
        x: Tensor,
        weight: Tensor,
        conv_state: Tensor,
        slots: Tensor,
        query_start_loc: Tensor,
        has_initial: Tensor,
        snapshots: tuple[Tensor, Tensor] | None = None,
        key_dim: int | None = None,
    ) -> Tensor:
        x = ungrouped(x, key_dim)
        history = weight.shape[1] - 1
        y = torch.zeros_like(x)
        for n, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            start, end = query_start_loc[n : n + 2].tolist()
            before = conv_state[slot, :, :history].t()
            if not has_initial[n]:
                before = torch.zeros_like(before)
            y[start:end], inputs = self._run(before, x[start:end], weight)
            if start < end:
                conv_state[slot, :, :history] = inputs[end - start :].t()
            if snapshots is not None:
                snapshot_slot, length = (int(values[n]) for values in snapshots)
                if snapshot_slot >= 0:
                    conv_state[snapshot_slot, :, :history] = inputs[length : length + history].t()
        return y

    def verify(
        self,
        x: Tensor,
        weight: Tensor,
        conv_state: Tensor,
        slots: Tensor,
        query_start_loc: Tensor,
        accepted: Tensor,
        steps: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        history = weight.shape[1] - 1
        y = torch.zeros_like(x)
        for n, slot in enumerate(slots.tolist()):
            start, end = query_start_loc[n : n + 2].tolist()
            if slot < 0 or start == end:
                continue
            offset = int(accepted[n]) - 1
            before = conv_state[slot, :, offset : offset + history].t()
            y[start:end], inputs = self._run(before, x[start:end], weight)
            if steps is None:
                conv_state[slot, :, : len(inputs) - 1] = inputs[1:].t()
                continue
            step_state, step_rows = steps
            if step_rows[n] >= 0:
                for t in range(end - start):
                    step_state[step_rows[n], t] = inputs[t + 1 : t + 1 + history].t()
        return y

    def decode(self, x: Tensor, weight: Tensor, conv_state: Tensor, slots: Tensor) -> Tensor:
        offsets = torch.arange(len(x) + 1)
        return self.verify(x, weight, conv_state, slots, offsets, torch.ones(len(x), dtype=torch.int64))

    def _run(self, before: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs of x [T, D] behind ``before`` [W − 1, D], and all inputs as the pool keeps them."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        inputs = torch.cat([before, x.to(before.dtype)])
        y = torch.empty_like(x)
        for t, token in enumerate(x):
            window = torch.cat([inputs[t : t + len(before)].to(dtype), token[None].to(dtype)])
            y[t] = convolve(window, weight.to(dtype))
        return y, inputs
