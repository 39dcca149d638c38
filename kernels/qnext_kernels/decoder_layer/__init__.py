"""What lies before and behind the token mixer of a decoder layer, each as one call.

    qkvz, ba     = linears of RMSNorm(x + residual)                          before Gated DeltaNet
    q, k, v, g   = qk_norm_rope_gate of a linear of RMSNorm(x + residual)    before attention
    out          = experts of RMSNorm(residual + linear(x · sigmoid(g)))     behind either

At a decode step a small operation takes less time than it takes to call it, since what calls it has left the caches
meanwhile. Where C++ serves all parts of a call, it runs them in one; otherwise they are called one after the other, and
raise what they raise. Either way the bits are the same.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from qnext_kernels.decoder_layer import native
from qnext_kernels.gated_attention import qk_norm_rope_gate, sigmoid_gate
from qnext_kernels.integers import INT4
from qnext_kernels.linear import linear
from qnext_kernels.moe import experts, experts_fp8, experts_int4, topk_softmax
from qnext_kernels.rms_norm import rms_norm

__all__ = ["ExpertsWeights", "LinearWeight", "linear_norm_experts", "norm_heads", "norm_linears"]


class LinearWeight(NamedTuple):
    """Of a linear layer, as :func:`qnext_kernels.linear` takes it."""

    weight: Tensor
    """[N, K]"""
    bias: Tensor | None = None
    """[N]"""
    packed: bool = False
    scale: Tensor | None = None
    """Of a weight in FP8, int4 or int8."""


class ExpertsWeights(NamedTuple):
    """Of routed experts and the shared one, as :func:`qnext_kernels.experts` takes them.

    With scales as ``experts_fp8`` takes them, which then does not quantize activations, or ``experts_int4``.
    """

    w13: Tensor
    """[E, 2·M, D]"""
    w2: Tensor
    """[E, D, M]"""
    packed: bool = False
    shared: tuple[Tensor, ...] | None = None
    """w13 [2·S, D], w2 [D, S] and gate [D] of the shared expert; each matrix with its scale behind it where
    :attr:`scales` are, unless it alone is not in int4 and has none; beside int4 it may be in int8."""
    scales: tuple[Tensor, Tensor] | None = None
    """Of w13 and w2 in FP8 or int4."""


def norm_linears(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, first: LinearWeight, second: LinearWeight
) -> tuple[Tensor, Tensor, Tensor]:
    """Two linears of RMSNorm(x + residual).

    Args:
        x, residual, norm_weight, eps: of :func:`qnext_kernels.rms_norm`, [T, D], [T, D] or None, and [D].
        first, second: [N1, D] and [N2, D].

    Returns:
        [T, N1] and [T, N2], and x + residual [T, D] (``x`` itself without a residual), all in the dtype of ``x``.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
    """
    if (
        native.serves(x, "rms_norm", "linear")
        and native.reads_norm(x, residual, norm_weight)
        and all(native.reads_linear(weight, x.shape[1], x.dtype) for weight in (first, second))
    ):
        one, other, total = native.norm_linears(x, residual, norm_weight, eps, *first, *second)
        return one, other, x if residual is None else total
    normed, total = rms_norm(x, norm_weight, eps, residual)
    return linear(normed, *first), linear(normed, *second), total


def norm_heads(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    qkv: LinearWeight,
    positions: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and gates of RMSNorm(x + residual).

    Args:
        x, residual, norm_weight, eps: of :func:`qnext_kernels.rms_norm`, [T, D], [T, D] or None, and [D].
        qkv: [(2·num_heads + 2·num_kv_heads) · head_dim, D].
        positions, q_weight, k_weight, cos_sin, num_heads, num_kv_heads: of :func:`qnext_kernels.qk_norm_rope_gate`,
            whose norms have the same ``eps``.

    Returns:
        q [T, num_heads · head_dim], k and v [T, num_kv_heads · head_dim], gate [T, num_heads · head_dim], and
        x + residual [T, D] (``x`` itself without a residual), all in the dtype of ``x``.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit.
    """
    heads = (positions, q_weight, k_weight, cos_sin, num_heads, num_kv_heads)
    if native.serves(x, "rms_norm", "linear", "gated_attention"):
        reads = native.reads_norm(x, residual, norm_weight) and native.reads_linear(qkv, x.shape[1], x.dtype)
        if reads and native.reads_heads(x.shape[0], qkv.weight.shape[0], *heads):
            norm = x, residual, norm_weight, eps
            q, k, v, gate, total = native.norm_heads(
                *norm, *qkv, positions, q_weight, k_weight, cos_sin, num_heads, num_kv_heads
            )
            return q, k, v, gate, x if residual is None else total
    normed, total = rms_norm(x, norm_weight, eps, residual)
    return (*qk_norm_rope_gate(linear(normed, *qkv), *heads, eps), total)


def linear_norm_experts(
    x: Tensor,
    gate: Tensor | None,
    out_proj: LinearWeight,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    router: LinearWeight,
    moe: ExpertsWeights,
    top_k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """A token mixer's output projection, and the MoE block behind it.

    Args:
        x: [T, K], any float dtype.
        gate: [T, K], of :func:`qnext_kernels.sigmoid_gate`, or None.
        out_proj: [D, K].
        residual: [T, D] in the dtype of ``x``.
        norm_weight, eps: of :func:`qnext_kernels.rms_norm`, [D].
        router: [E, D].
        moe: of E experts.
        top_k, renormalize: of :func:`qnext_kernels.topk_softmax`.

    Returns:
        Σ of the experts, and residual + the projected, both [T, D] in the dtype of ``x``.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    parts = ("gated_attention", "linear", "rms_norm", "moe")
    block = (x, gate, out_proj, residual, norm_weight, router, moe, top_k)
    if native.serves(x, *parts) and native.reads_block(*block):
        shared: tuple[Tensor, ...] = () if moe.shared is None else moe.shared
        before, stored = (x, gate, *out_proj, residual, norm_weight, eps), (moe.w13, moe.w2, moe.scales or ())
        return native.linear_norm_experts(*before, *router, *stored, moe.packed, shared, top_k, renormalize)
    gated = x if gate is None else sigmoid_gate(x, gate)
    normed, total = rms_norm(linear(gated, *out_proj), norm_weight, eps, residual)
    choice = topk_softmax(linear(normed, *router), top_k, renormalize)
    if moe.scales is None:
        return experts(normed, moe.w13, moe.w2, *choice, moe.packed, moe.shared), total  # type: ignore[arg-type]
    weights = moe.w13, moe.scales[0], moe.w2, moe.scales[1]
    if moe.w13.dtype == INT4:
        return experts_int4(normed, *weights, *choice, moe.packed, moe.shared), total  # type: ignore[arg-type]
    return experts_fp8(normed, *weights, *choice, moe.packed, moe.shared, False), total  # type: ignore[arg-type]
