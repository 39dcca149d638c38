"""The gates and norms of the gated delta rule, inside Triton kernels. Everything is float32."""

from __future__ import annotations

import triton
import triton.language as tl


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
def inverse_norm(x, axis: tl.constexpr, eps: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 / √(Σ x² + eps) over an axis."""
    return tl.rsqrt(tl.sum(x * x, axis=axis) + eps)
