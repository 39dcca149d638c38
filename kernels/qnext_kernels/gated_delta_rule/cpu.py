"""Vectorised PyTorch: the recurrence over the batch for short runs, the chunked form for long ones."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import Backend, refuse_if_deterministic
from qnext_kernels.gated_delta_rule.reference import CHUNK_SIZE, Tokens, gating, l2_norm, snapshot_points, take

RECURRENT_TOKENS = 4
"""A chunk of at most this many tokens runs token by token, with the bits of decode and verify."""
BLOCK_ELEMENTS = 1 << 17
"""State elements stepped together: 512 KiB, an L2 cache. Sixfold faster than all at once at 8 × [32, 128, 128]."""


class CpuBackend(Backend):
    """Float32 throughout. Every chunk has the same padded shape whatever the batch, so that no result depends on it."""

    name = "cpu"
    devices = ("cpu",)

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
        refuse_if_deterministic("gated_delta_rule", "the chunked form in PyTorch")
        tokens = _prepare(q, k, v, a, b, A_log, dt_bias)
        out = torch.zeros_like(v)
        offsets, initial = query_start_loc.tolist(), has_initial.tolist()
        points = snapshot_points(query_start_loc, snapshots)
        for n, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            snapshot_slot, snapshot_at = points[n]
            current = state[slot] if initial[n] else torch.zeros_like(state[slot])
            for start in range(offsets[n], offsets[n + 1], CHUNK_SIZE):
                if start == snapshot_at:
                    state[snapshot_slot] = current
                end = min(start + CHUNK_SIZE, offsets[n + 1])
                run = _recurrent_run if end - start <= RECURRENT_TOKENS else _chunk
                o, current = run(take(tokens, slice(start, end)), current.float(), state.dtype)
                out[start:end] = o
            if offsets[n + 1] == snapshot_at:
                state[snapshot_slot] = current
            if offsets[n] < offsets[n + 1]:
                state[slot] = current
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
        tokens = _prepare(q, k, v, a, b, A_log, dt_bias)
        out = torch.zeros_like(v)
        slots, starts, lengths = slots.long(), query_start_loc[:-1].long(), query_start_loc.diff()
        initial = slots.gather(1, accepted.long()[:, None] - 1).squeeze(1)
        lengths = torch.where(initial >= 0, lengths, 0)
        for block in torch.arange(len(slots)).split(_sequences_at_once(state)) if len(slots) else ():
            current = state[initial[block].clamp(min=0)].float()
            for t in range(int(lengths[block].max())):
                pool, targets = (state, slots[:, t]) if steps is None else (steps[0][:, t], steps[1].long())
                active = lengths[block] > t
                rows = block[active]
                index = starts[rows] + t
                running = current[active]
                out[index] = _step_(take(tokens, index), running).to(out.dtype)
                stored = running.to(pool.dtype)
                current[active] = stored.float()
                write = targets[rows] >= 0
                pool[targets[rows][write]] = stored[write]
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
        tokens = _prepare(q, k, v, a, b, A_log, dt_bias)
        if len(slots) > 1 and _sequences_at_once(state) == 1:
            out = torch.zeros_like(v)
            for n, slot in enumerate(slots.tolist()):
                if slot >= 0:
                    current = state[slot].float()  # a view of a float32 pool, which is then stepped where it lies
                    out[n] = _step_(take(tokens, n), current)
                    if state.dtype != torch.float32:
                        state[slot] = current
            return out
        slots = slots.long()
        current = state[slots.clamp(min=0)].float()
        o = _step_(tokens, current)
        write = slots >= 0
        state[slots[write]] = current[write].to(state.dtype)
        return torch.where(write[:, None, None], o.to(v.dtype), 0)


def _sequences_at_once(state: Tensor) -> int:
    """How many sequences to run together: small states in one go, large ones one by one, so that they stay in cache."""
    return max(1, BLOCK_ELEMENTS // state[0].numel()) if len(state) else 1


def _step_(tokens: Tokens, state: Tensor) -> Tensor:
    """:func:`qnext_kernels.gated_delta_rule.reference.recurrence` with ``state`` [..., HV, V, K] stepped in place."""
    q, k, v, g, beta = tokens
    state.mul_(torch.exp(g)[..., None, None])
    delta = (v - (state * k[..., None, :]).sum(dim=-1)) * beta[..., None]
    state.addcmul_(delta[..., None], k[..., None, :])
    return (state * q[..., None, :]).sum(dim=-1)


def _prepare(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tokens:
    """Float32 q, k [T, HV, K] (normalised, scaled, a value head each), v [T, HV, V], g and beta [T, HV]."""
    group = v.shape[1] // q.shape[1]
    q = (l2_norm(q.float().contiguous()) * q.shape[2] ** -0.5).repeat_interleave(group, dim=1)
    k = l2_norm(k.float().contiguous()).repeat_interleave(group, dim=1)
    g, beta = gating(a.float(), b.float(), A_log, dt_bias)
    return q, k, v.float(), g, beta


def _recurrent_run(tokens: Tokens, state: Tensor, state_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Token by token, rounding to the dtype of the pool after each as a decode does; state [HV, V, K] float32."""
    outputs, state = [], state.clone()
    for t in range(tokens[0].shape[0]):
        outputs.append(_step_(take(tokens, t), state))
        state = state.to(state_dtype).float()
    return torch.stack(outputs), state


def _chunk(tokens: Tokens, state: Tensor, state_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One chunk in the WY form (Gated Delta Networks, section 3.3): matrix products instead of a loop over tokens.

    Args:
        tokens: q, k [C, HV, K], v [C, HV, V], g and beta [C, HV], float32, C ≤ CHUNK_SIZE; padded tokens are neutral
            (no decay, nothing written).
        state: [HV, V, K] float32 before the chunk.
        state_dtype: dtype of the pool, to which a split prefill would round here.

    Returns:
        Outputs [C, HV, V] and the state behind the chunk.
    """
    q, k, v, g, beta = (_pad_chunk(x) for x in tokens)
    decay = g.cumsum(dim=-1)
    causal = torch.ones(CHUNK_SIZE, CHUNK_SIZE, dtype=torch.bool).tril()
    # Masked before the exponential: above the diagonal the difference is positive and may overflow.
    pairwise = (decay[:, :, None] - decay[:, None, :]).masked_fill(~causal, float("-inf")).exp()
    from_start = decay.exp()[:, :, None]
    k_beta = k * beta[:, :, None]
    # solve_triangular takes the unit diagonal as given and reads only what is below it.
    system = torch.bmm(k_beta, k.transpose(1, 2)) * pairwise
    right = torch.cat([v * beta[:, :, None], k_beta * from_start], dim=2)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, keys = solved.split([v.shape[2], k.shape[2]], dim=2)
    new_values = values - torch.bmm(keys, state.transpose(1, 2))
    intra = torch.bmm(torch.bmm(q, k.transpose(1, 2)) * pairwise, new_values)
    out = torch.bmm(q * from_start, state.transpose(1, 2)) + intra
    to_end = (decay[:, -1:] - decay).exp()[:, :, None]
    state = state * from_start[:, -1:] + torch.bmm(new_values.transpose(1, 2), k * to_end)
    return out.transpose(0, 1)[: tokens[0].shape[0]], state.to(state_dtype).float()


def _pad_chunk(x: Tensor) -> Tensor:
    """[C, HV, ...] → [HV, CHUNK_SIZE, ...], zero beyond C, always in fresh memory so that its alignment is the same."""
    padded = x.new_zeros(x.shape[1], CHUNK_SIZE, *x.shape[2:])
    padded[:, : x.shape[0]] = x.transpose(0, 1)
    return padded
