"""What the kernels of several operations compute element by element or row by row. Everything is float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inverse_root(x):  # type: ignore[no-untyped-def]
    """√sigmoid(x): a power of two and a reciprocal root are an instruction each, an exponential and a quotient 14."""
    return tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(−x))."""
    root = inverse_root(x)
    return root * root


@triton.jit
def silu(x):  # type: ignore[no-untyped-def]
    """x · sigmoid(x)."""
    root = inverse_root(x)
    return x * root * root


@triton.jit
def outer_and_inner(row, inner, rows):  # type: ignore[no-untyped-def]
    """row // inner and row % inner of rows [ROWS] below ``rows``; one outer row costs no division before the loads."""
    outer, within = tl.zeros_like(row), row
    if rows > inner:
        outer = row // inner
        within = row - outer * inner
    return outer.to(tl.int64), within.to(tl.int64)


@triton.jit
def inverse_rms(x, eps, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 / √(mean(x²) + eps) of rows [ROWS, BLOCK] of WIDTH elements and zeros, as a column [ROWS, 1]."""
    return tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)[:, None]


@triton.jit
def pairwise_sum(x, ROWS: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σ of each row of x [ROWS, SIZE], SIZE a power of two: of neighbours, then of neighbouring sums, and so on.

    A sum of two has one order, so that the result does not depend on how the threads share a row.
    """
    for level in tl.static_range(1, 16):
        if SIZE >> level > 0:
            x = tl.sum(tl.reshape(x, [ROWS, SIZE >> level, 2]), axis=2)
    return tl.reshape(x, [ROWS])
