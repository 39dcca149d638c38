"""The gates and the norms of the gated delta rule, inside Triton kernels. Everything is float32."""

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
