"""The definition of the gated delta rule: one sequence at a time, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import Backend
from qnext_kernels.elementwise import sigmoid, softplus

CHUNK_SIZE = 64
"""Tokens a chunk of the chunked prefill; splitting a prefill at its multiples changes no bit."""
L2_NORM_EPS = 1e-6

Tokens = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""q and k (normalised, scaled, a value head each), v, g and beta, tokens first."""


def take(tokens: Tokens, index: int | slice | Tensor) -> Tokens:
    """The tokens at an index, a range or an index tensor."""
    q, k, v, g, beta = tokens
    return q[index], k[index], v[index], g[index], beta[index]


def snapshot_points(query_start_loc: Tensor, snapshots: tuple[Tensor, Tensor] | None) -> list[tuple[int, int]]:
    """For every sequence the slot of its snapshot and the token of the batch before which to take it; −1: never."""
    starts = query_start_loc[:-1]
    if snapshots is None:
        return [(-1, -1)] * len(starts)
    slots, lengths = snapshots
    return list(zip(slots.tolist(), torch.where(slots >= 0, starts + lengths, -1).tolist(), strict=True))


def gating(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Log decay g = −exp(A_log) · softplus(a + dt_bias) and write strength β = sigmoid(b).

    Args:
        a, b: [..., HV].
        A_log, dt_bias: [HV].

    Returns:
        g and beta, [..., HV], float32 (float64 if ``a`` is).
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    g = -torch.exp(A_log.to(dtype)) * softplus(a.to(dtype) + dt_bias.to(dtype))
    return g, sigmoid(b.to(dtype))


def l2_norm(x: Tensor) -> Tensor:
    """x / √(Σ x² + 1e-6) over the last axis (transformers' ``l2norm``)."""
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + L2_NORM_EPS)


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token.

    Args:
        q, k: [..., HV, K], normalised and scaled.
        v: [..., HV, V].
        g, beta: [..., HV].
        state: [..., HV, V, K].

    Returns:
        The output [..., HV, V] and the new state [..., HV, V, K].
    """
    state = state * torch.exp(g)[..., None, None]
    predicted = (state * k[..., None, :]).sum(dim=-1)
    delta = (v - predicted) * beta[..., None]
    state = state + delta[..., None] * k[..., None, :]
    return (state * q[..., None, :]).sum(dim=-1), state


class ReferenceBackend(Backend):
    """Readable PyTorch, in float32 (float64 for float64 inputs).

    ``snapshots`` are their slots and lengths, ``steps`` the step pool and its rows.
    """

    name = "reference"

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
        tokens = self._prepare(q, k, v, a, b, A_log, dt_bias)
        out = torch.zeros_like(v)
        points = snapshot_points(query_start_loc, snapshots)
        for n, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            start, end = query_start_loc[n : n + 2].tolist()
            snapshot_slot, snapshot_at = points[n]
            current = state[slot] if has_initial[n] else torch.zeros_like(state[slot])
            for t in range(start, end):
                if t == snapshot_at:
                    state[snapshot_slot] = current
                o, new = recurrence(*take(tokens, t), current.to(tokens[0].dtype))
                out[t], current = o, new.to(state.dtype)
            if end == snapshot_at:
                state[snapshot_slot] = current
            if start < end:
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
        tokens = self._prepare(q, k, v, a, b, A_log, dt_bias)
        out = torch.zeros_like(v)
        for n, row in enumerate(slots.tolist()):
            start, end = query_start_loc[n : n + 2].tolist()
            initial = row[int(accepted[n]) - 1]
            if initial < 0:
                continue
            current = state[initial].clone()
            for t in range(start, end):
                o, new = recurrence(*take(tokens, t), current.to(tokens[0].dtype))
                if steps is None:
                    pool, target = state, row[t - start]
                else:
                    pool, target = steps[0][:, t - start], int(steps[1][n])
                out[t], current = o, new.to(pool.dtype)
                if target >= 0:
                    pool[target] = current
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
        offsets, accepted = torch.arange(len(slots) + 1), torch.ones(len(slots), dtype=torch.int64)
        return self.verify(q, k, v, a, b, A_log, dt_bias, state, slots[:, None], offsets, accepted)

    def _prepare(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tokens:
        dtype = torch.promote_types(v.dtype, torch.float32)
        group = v.shape[1] // q.shape[1]
        q = (l2_norm(q.to(dtype)) * q.shape[2] ** -0.5).repeat_interleave(group, dim=1)
        k = l2_norm(k.to(dtype)).repeat_interleave(group, dim=1)
        g, beta = gating(a.to(dtype), b.to(dtype), A_log, dt_bias)
        return q, k, v.to(dtype), g, beta
