"""The gates, the norms and the recurrence of the gated delta rule, inside Triton kernels. Everything is float32.

Kernels that run token by token must agree to the bit. They share what is here, are compiled without fusing a product
into a sum, and fuse by hand: what is rounded is then written down and does not change with the code around it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qnext_kernels.triton_elementwise import pairwise_sum


@triton.jit
def log_decay(a, A_log, dt_bias):  # type: ignore[no-untyped-def]
    """g = −exp(A_log) · softplus(a + dt_bias), never positive."""
    x = a + dt_bias
    tail = tl.exp(-tl.abs(x))
    # log(1 + tail) with the rounding of the sum divided out: a small g is summed over many tokens.
    one_more = 1.0 + tail
    step = one_more - 1.0
    log1p = tl.where(step == 0.0, tail, tl.log(one_more) * (tail / tl.where(step == 0.0, 1.0, step)))
    return -tl.exp(A_log) * (log1p + tl.maximum(x, 0.0))


@triton.jit
def write_strength(b):  # type: ignore[no-untyped-def]
    """β = sigmoid(b), the exponential of a number that is never positive."""
    tail = tl.exp(-tl.abs(b))
    return tl.where(b >= 0.0, 1.0, tail) / (1.0 + tail)


@triton.jit
def inverse_norms(x, ROWS: tl.constexpr, SIZE: tl.constexpr, eps: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 / √(Σ x² + eps) of each row of x [ROWS, SIZE], the sum as in :func:`pairwise_sum`."""
    return tl.rsqrt(pairwise_sum(x * x, ROWS, SIZE) + eps)


@triton.jit
def recurrence(S, q, k, v, g, beta):  # type: ignore[no-untyped-def]
    """One token: rows of the state [.., K] behind it and their outputs; q and k [K] are normalised.

    Equation 10 of Gated Delta Networks (arXiv 2412.06464). The keys of a row lie in one warp, whatever their number.
    """
    S = S * tl.exp(g)
    predicted = tl.sum(S * k[None, :], axis=1)
    S = tl.fma(tl.broadcast_to(((v - predicted) * beta)[:, None], S.shape), tl.broadcast_to(k[None, :], S.shape), S)
    return S, tl.sum(S * q[None, :], axis=1)


@triton.jit
def step(  # type: ignore[no-untyped-def]
    S, q, k, v, a, b, A_log, dt_bias, K: tl.constexpr, BLOCK_K: tl.constexpr, eps: tl.constexpr
):
    """One token as memory has it, q and k [BLOCK_K] with zeros behind K: norms, gates and :func:`recurrence`."""
    q, k = q.to(tl.float32), k.to(tl.float32)
    g = log_decay(a.to(tl.float32), A_log, dt_bias)
    beta = write_strength(b.to(tl.float32))
    q = q * (tl.sum(inverse_norms(q, 1, BLOCK_K, eps), axis=0) * (K**-0.5))
    k = k * tl.sum(inverse_norms(k, 1, BLOCK_K, eps), axis=0)
    return recurrence(S, q, k, v.to(tl.float32), g, beta)
