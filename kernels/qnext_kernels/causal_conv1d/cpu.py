"""Vectorised PyTorch: all tokens of all sequences at once; only the steps of a step pool are stored one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.causal_conv1d.grouping import ungrouped
from qnext_kernels.dispatch import Backend
from qnext_kernels.elementwise import silu


class CpuBackend(Backend):
    """One buffer holds every sequence's history followed by its tokens; an output is W shifted reads of it."""

    name = "cpu"
    devices = ("cpu",)

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
        width = weight.shape[1] - 1
        slots, lengths = slots.long(), query_start_loc.diff().long()
        pool = conv_state[:, :, :width]
        history = pool[slots.clamp(min=0)].transpose(1, 2)
        history = torch.where(has_initial[:, None, None], history, 0)
        y, buffer, ends = _convolve_ragged(x, weight, history, query_start_loc)
        _store_windows(pool, slots, (slots >= 0) & (lengths > 0), buffer, ends)
        if snapshots is not None:
            snapshot_slots, snapshot_lengths = snapshots
            write = (slots >= 0) & (snapshot_slots >= 0)
            _store_windows(pool, snapshot_slots.long(), write, buffer, ends - lengths + snapshot_lengths)
        return _zero_skipped(y, slots, query_start_loc)

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
        width = weight.shape[1] - 1
        slots = slots.long()
        old = conv_state[slots.clamp(min=0)].transpose(1, 2)
        columns = (accepted.long() - 1)[:, None] + torch.arange(width)
        history = old.gather(1, columns[:, :, None].expand(-1, -1, x.shape[1]))
        y, buffer, ends = _convolve_ragged(x, weight, history, query_start_loc)
        y = _zero_skipped(y, slots, query_start_loc)
        lengths = query_start_loc.diff().long()
        if steps is not None:
            step_state, step_rows = steps
            step_rows = torch.where(slots >= 0, step_rows.long(), -1)
            # One step at a time: they may share memory, and a store to all of them at once would be undefined.
            for t, step in enumerate(step_state.unbind(1)):
                write = (step_rows >= 0) & (lengths > t)
                _store_windows(step, step_rows, write, buffer, ends - lengths + t + 1)
            return y
        # Window j of the new state is input 1 + j of [history, tokens]; columns past the last token keep what they had.
        position = torch.arange(conv_state.shape[2])
        filled = position < (lengths + width - 1)[:, None]
        rows = (ends - lengths - width + 1)[:, None] + position
        window = torch.where(filled[:, :, None], buffer[torch.where(filled, rows, 0)], old)
        write = (slots >= 0) & (lengths > 0)
        conv_state[slots[write]] = window[write].transpose(1, 2)
        return y

    def decode(self, x: Tensor, weight: Tensor, conv_state: Tensor, slots: Tensor) -> Tensor:
        width = weight.shape[1] - 1
        slots = slots.long()
        history = conv_state[slots.clamp(min=0), :, :width]
        y = _weighted_sum([*history.unbind(dim=2), x], weight).to(x.dtype)
        write = slots >= 0
        window = torch.cat([history[:, :, 1:], x[:, :, None].to(history.dtype)], dim=2)
        conv_state[slots[write], :, :width] = window[write]
        return torch.where(write[:, None], y, 0)


def _weighted_sum(inputs: list[Tensor], weight: Tensor) -> Tensor:
    """SiLU(Σ_w weight[d, w] · inputs[w][..., d]) in float32, added from w = 0 upwards."""
    weight = weight.float()
    total = inputs[0].float() * weight[:, 0]
    for w in range(1, weight.shape[1]):
        total += inputs[w].float() * weight[:, w]
    return silu(total)


def _convolve_ragged(
    x: Tensor, weight: Tensor, history: Tensor, query_start_loc: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve tokens [T, D] behind history [N, W − 1, D].

    Returns the outputs [T, D], the buffer [T + N·(W − 1), D] of every sequence's history and tokens in the dtype of the
    history, and the row [N] behind each sequence's last token in it. An output takes its own token from ``x`` and the
    ones before it from the buffer, rounded as the pool would have kept them.
    """
    num_sequences, width, _ = history.shape
    offsets = query_start_loc.long()
    order = torch.arange(num_sequences)
    sequence = order.repeat_interleave(offsets.diff(), output_size=x.shape[0])
    token_rows = torch.arange(x.shape[0]) + (sequence + 1) * width
    history_rows = (offsets[:-1] + order * width)[:, None] + torch.arange(width)
    buffer = history.new_empty(x.shape[0] + num_sequences * width, x.shape[1])
    buffer[token_rows] = x.to(history.dtype)
    buffer[history_rows] = history
    y = _weighted_sum([*(buffer[token_rows - width + w] for w in range(width)), x], weight)
    return y.to(x.dtype), buffer, offsets[1:] + (order + 1) * width


def _store_windows(pool: Tensor, slots: Tensor, write: Tensor, buffer: Tensor, ends: Tensor) -> None:
    """Store the W − 1 rows of the buffer before ``ends`` [N] in the pool [slots, D, W − 1], where ``write`` [N]."""
    rows = ends[write, None] + torch.arange(-pool.shape[2], 0)
    pool[slots[write]] = buffer[rows].transpose(1, 2)


def _zero_skipped(y: Tensor, slots: Tensor, query_start_loc: Tensor) -> Tensor:
    keep = (slots >= 0).repeat_interleave(query_start_loc.diff(), output_size=y.shape[0])
    return torch.where(keep[:, None], y, 0)
