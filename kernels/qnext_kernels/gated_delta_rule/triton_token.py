"""One token of the gated delta rule and rows of its state, in the registers of kernels that run token by token.

Those agree to the bit. They share what is here, are compiled without fusing a product into a sum, and fuse by hand:
what is rounded is then written down and does not change with the code around it. The keys of a row are four parts, a
tuple of tensors. Of a part a thread takes four keys at once, which is 16 bytes of float32, and of a row its keys of
all four parts; so eight threads share a row of 128 keys, and a sum over it is three exchanges between them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qnext_kernels.gated_delta_rule.triton_math import log_decay, write_strength
from qnext_kernels.triton_support import power_of_two


def part_of(key_dim: int) -> int:
    """Keys of a part: a power of two, whose last parts may lie behind the last key."""
    return max(4, power_of_two(key_dim) // 4)


@triton.jit
def keys_of_part(PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """0 to PART − 1; how threads share them does not depend on the dtype of what is loaded."""
    return tl.max_contiguous(tl.arange(0, PART), 4)


@triton.jit
def load_parts(at, key, there, K: tl.constexpr, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """The keys of one row, or of several, in parts; zeros where not ``there`` and behind K.

    Args:
        at: where rows begin, a pointer or [R, 1] of them; ``there``: of the same shape.
        key: those of the first part, [PART] or [1, PART].
    """
    return (
        tl.load(at + key, mask=there & (key < K), other=0.0),
        tl.load(at + (key + PART), mask=there & (key + PART < K), other=0.0),
        tl.load(at + (key + 2 * PART), mask=there & (key + 2 * PART < K), other=0.0),
        tl.load(at + (key + 3 * PART), mask=there & (key + 3 * PART < K), other=0.0),
    )


@triton.jit
def store_parts(at, key, x, there, K: tl.constexpr, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows x where :func:`load_parts` finds them."""
    tl.store(at + key, x[0], mask=there & (key < K))
    tl.store(at + (key + PART), x[1], mask=there & (key + PART < K))
    tl.store(at + (key + 2 * PART), x[2], mask=there & (key + 2 * PART < K))
    tl.store(at + (key + 3 * PART), x[3], mask=there & (key + 3 * PART < K))


@triton.jit
def cast_parts(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """x in another dtype."""
    return x[0].to(dtype), x[1].to(dtype), x[2].to(dtype), x[3].to(dtype)


@triton.jit
def load_token(  # type: ignore[no-untyped-def]
    token, end, q, k, v, a, b, q_token, k_token, v_token, a_token, b_token, key, has_value,
    K: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """A token as memory has it, q and k in parts; zeros from ``end`` on. q to b: where token 0 lies."""
    there = token < end
    return (
        load_parts(q + token * q_token, key, there, K, PART),
        load_parts(k + token * k_token, key, there, K, PART),
        tl.load(v + token * v_token, mask=has_value & there, other=0.0),
        tl.load(a + token * a_token, mask=there, other=0.0),
        tl.load(b + token * b_token, mask=there, other=0.0),
    )


@triton.jit
def add_both(a, b, c, d):  # type: ignore[no-untyped-def]
    """Of two sums at once."""
    return a + c, b + d


@triton.jit
def products_and_squares(S, x):  # type: ignore[no-untyped-def]
    """Σ S x of every row of S, in parts [R, PART], and Σ x²; x in parts [PART].

    Both are one reduction, so that threads share x as they share S, whatever kernel it is in.
    """
    shape: tl.constexpr = S[0].shape
    x = x[0][None, :], x[1][None, :], x[2][None, :], x[3][None, :]
    product = S[0] * x[0]
    product = tl.fma(S[1], tl.broadcast_to(x[1], shape), product)
    product = tl.fma(S[2], tl.broadcast_to(x[2], shape), product)
    product = tl.fma(S[3], tl.broadcast_to(x[3], shape), product)
    square = tl.fma(x[3], x[3], tl.fma(x[2], x[2], tl.fma(x[1], x[1], x[0] * x[0])))
    return tl.reduce((product, tl.broadcast_to(square, shape)), axis=1, combine_fn=add_both)


@triton.jit
def add_outer(S, u, k):  # type: ignore[no-untyped-def]
    """S + u ⊗ k for one part."""
    return tl.fma(tl.broadcast_to(u[:, None], S.shape), tl.broadcast_to(k[None, :], S.shape), S)


@triton.jit
def step(S, q, k, v, a, b, A_log, dt_bias, K: tl.constexpr, eps: tl.constexpr):  # type: ignore[no-untyped-def]
    """One token as memory has it: rows of the state, in parts [R, PART], behind it and their outputs.

    Equation 10 of Gated Delta Networks (arXiv 2412.06464), k normalised by 1 / √(Σ k² + eps) and q in the same way and
    by 1 / √K. Both factors are taken out of the sums, which need not wait for them.
    """
    q, k, v = cast_parts(q, tl.float32), cast_parts(k, tl.float32), v.to(tl.float32)
    decay = tl.exp(log_decay(a.to(tl.float32), A_log, dt_bias))
    beta = write_strength(b.to(tl.float32))
    S = S[0] * decay, S[1] * decay, S[2] * decay, S[3] * decay
    product, square = products_and_squares(S, k)
    scale = tl.rsqrt(square + eps)
    u = (v - product * scale) * beta * scale
    S = add_outer(S[0], u, k[0]), add_outer(S[1], u, k[1]), add_outer(S[2], u, k[2]), add_outer(S[3], u, k[3])
    product, square = products_and_squares(S, q)
    return S, product * (tl.rsqrt(square + eps) * (K**-0.5))
