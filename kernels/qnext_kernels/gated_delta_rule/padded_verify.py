"""A verify by a library that takes as many tokens of each sequence and writes no slots, on pools of slots."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from qnext_kernels.gated_delta_rule.triton import expect_contiguous_slots
from qnext_kernels.triton_support import aligned_rows

BUFFER = 1 << 27
"""Elements of states beside the pools, 512 MiB: a larger batch goes in parts. FlashInfer indexes them with 32 bits."""


class PaddedVerify(Protocol):
    """The library's part.

    Takes q and k [N, T, H, K], v [N, T, HV, V], a and b [N, T, HV]; the slots [N] that sequences start from, −1 for
    none, in int64, so that addresses are computed with 64 bits; outputs [N, T, HV, V] in the dtype of v, zero, and
    states [N, T, HV, V, K] float32, of anything: all contiguous, from aligned addresses. T is at least 2. Writes the
    outputs, and the states behind every token; nothing of a sequence that starts from −1.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, initial: Tensor, out: Tensor, states: Tensor
    ) -> None: ...


def padded_verify(
    verify: PaddedVerify,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    accepted: Tensor,
    steps: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Verify with ``verify``; the arguments are those of the operation, ``state`` and the step pool in float32.

    Each sequence is as long as the longest may be: behind its end it has some token again, of which nothing is kept.
    What that costs beside the library's own work: every state written is read and written once more, and so are the
    tokens. Nothing is read on the host.
    """
    from qnext_kernels.gated_delta_rule.triton_packed import save_states

    expect_contiguous_slots("state", state, 1)
    pool, columns = state, slots
    if steps is not None:
        expect_contiguous_slots("step_state", steps[0], 2)
        pool, columns = steps[0], steps[1][:, None].expand(-1, steps[0].shape[1])
    num_tokens, (count, longest) = v.shape[0], columns.shape
    # The last row is written by what sequences have behind their end.
    out = torch.zeros((num_tokens + 1, *v.shape[1:]), dtype=v.dtype, device=v.device)
    if count == 0 or longest == 0 or v.numel() == 0:
        return out[:-1]
    initial = slots.gather(1, accepted.long().clamp(1, slots.shape[1])[:, None] - 1).long()
    targets = torch.where(initial >= 0, columns, -1).contiguous()
    token = query_start_loc[:-1, None].long() + torch.arange(max(2, longest), device=v.device)
    source = token.clamp(max=num_tokens - 1)
    target = torch.where(token < query_start_loc[1:, None], token, num_tokens)

    width = token.shape[1]
    at_once = min(count, max(1, BUFFER // (width * pool.shape[-3:].numel())))
    states = torch.empty((at_once, width, *pool.shape[-3:]), dtype=torch.float32, device=v.device)
    with torch.cuda.device_of(v):
        for first in range(0, count, at_once):
            part = slice(first, first + at_once)
            rows = source[part].flatten()
            of_q, of_k, of_v, of_a, of_b = (x.index_select(0, rows).unflatten(0, (-1, width)) for x in (q, k, v, a, b))
            part_out, part_states = torch.zeros_like(of_v), states[: len(of_v)]
            start_from = aligned_rows(initial[part, 0].contiguous())
            verify(of_q, of_k, of_v, of_a, of_b, start_from, part_out, part_states)
            save_states(part_states, pool, targets[part], query_start_loc[first : first + at_once + 1])
            out.index_copy_(0, target[part].flatten(), part_out.flatten(0, 1))
    return out[:-1]
