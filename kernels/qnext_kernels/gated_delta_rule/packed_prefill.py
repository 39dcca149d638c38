"""A prefill by a library whose states lie one behind another, on pools of slots."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from qnext_kernels.gated_delta_rule.reference import gating
from qnext_kernels.triton_support import aligned_rows


class ChunkedPrefill(Protocol):
    """The library's part.

    Takes q and k [T, H, K], L2-normalised and rounded to the dtype of v, not yet scaled; v [T, HV, V]; the log decay g
    and the write strength beta [T, HV] float32; initial states [N, HV, V, K] float32; query_start_loc [N + 1]: all
    contiguous, from aligned addresses. Returns outputs [T, HV, V] in the dtype of v, contiguous, and final states like
    the initial ones. A sequence without tokens may have any final state.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor, query_start_loc: Tensor
    ) -> tuple[Tensor, Tensor]: ...


def packed_prefill(
    chunked: ChunkedPrefill,
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
) -> Tensor:
    """Prefill with ``chunked``; the arguments are those of the operation, ``state`` in float32.

    What it costs beside the library's own work: each state is read and written once more on its way in and once more on
    its way out, 4 · HV · V · K · 4 bytes a sequence, 8 MiB for all heads of the published model; q and k are read and
    written once for their norm, and v where it is columns of a projection.
    """
    from qnext_kernels.gated_delta_rule.triton_packed import clear_skipped, load_states, normalized, save_states

    if len(slots) == 0 or v.numel() == 0:
        return torch.empty_like(v, memory_format=torch.contiguous_format)
    slots, has_initial = slots.contiguous(), has_initial.contiguous()
    query_start_loc = aligned_rows(query_start_loc)
    g, beta = gating(a.float(), b.float(), A_log, dt_bias)
    with torch.cuda.device_of(v):
        initial = load_states(state, slots, has_initial)
        tokens = normalized(q), normalized(k), aligned_rows(v.contiguous()), g.contiguous(), beta.contiguous()
        out, final = chunked(*tokens, initial, query_start_loc)
        save_states(final, state, slots, query_start_loc)
        clear_skipped(out, slots, query_start_loc)
    return out
