"""Chunks of 64 tokens of a prefill: two launches for any number of sequences of any length, of which this is one.

The chunked form of Gated Delta Networks (arXiv 2412.06464, section 3.3). For one value head and one chunk of C tokens
with the state S [V, K] before it, G_i = g_1 + … + g_i, and rows k̂ and q̂ of L2 norm 1 (q̂ scaled by 1/√K):

    D_ij = exp(g_{j+1} + … + g_i)  for i ≥ j, else 0                [C, C]
    A    = strictly lower part of  diag(β) (k̂ k̂ᵀ ∘ D)               [C, C]
    M    = (I + A)⁻¹ diag(β),      P = q̂ k̂ᵀ ∘ D                     [C, C]   the first kernel, every chunk by itself
    n_i  = Σ_j M_ij (v_j − exp(G_j) S k̂_j)                          [C, V]   the walk, chunk after chunk
    o_i  = exp(G_i) S q̂_i + Σ_j P_ij n_j                            [C, V]
    S   ← exp(G_C) S + Σ_i exp(G_C − G_i) n_i ⊗ k̂_i                 [V, K]

Norms, scale and decays are factors of rows and columns and are applied to the float32 products, so that q, k and v
enter every product as they came. A token that forgets everything costs its neighbours no accuracy: sums of g have a
coarse part, whose differences are exact, and a fine one (:func:`decay_sums`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.gated_delta_rule.cpu import RECURRENT_TOKENS
from qnext_kernels.gated_delta_rule.reference import CHUNK_SIZE, L2_NORM_EPS
from qnext_kernels.gated_delta_rule.triton_math import log_decay, write_strength
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_support import Target, power_of_two

STORED = 4 << 10
"""Bytes of shared memory of the walk beside its tiles."""


@triton.jit
def sequence_of_chunk(chunk, query_start_loc, sequences, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """The last sequence n whose first chunk, number ⌊start_n / C⌋ + n, is not behind ``chunk``.

    Those numbers leave room for ⌈length_n / C⌉ chunks each and end below ⌊T / C⌋ + N: no sum over lengths is needed,
    on the host or here.
    """
    low = chunk * 0
    high = low + sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(query_start_loc + middle).to(tl.int64) // C + middle <= chunk
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    return low


@triton.jit
def tf32_parts(x):  # type: ignore[no-untyped-def]
    """Two float32 of ten bits each, whose sum is x but for 2⁻²² of it."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    low = ((x - high).to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return high, low.to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """a b in float32, of factors rounded to float16 if PRECISION says so; other words are Triton's ``input_precision``.

    Triton's own tf32x3 splits b with whole columns in a thread, whose registers cannot hold them.
    """
    if PRECISION == "float16":
        out = tl.dot(a.to(tl.float16), b.to(tl.float16), out_dtype=tl.float32)
    elif PRECISION == "tf32x3":
        a, a_low = tf32_parts(a)
        b, b_low = tf32_parts(b)
        out = tl.dot(a_low, b, input_precision="tf32", out_dtype=tl.float32)
        out = tl.dot(a, b_low, out, input_precision="tf32", out_dtype=tl.float32)
        out = tl.dot(a, b, out, input_precision="tf32", out_dtype=tl.float32)
    else:
        out = tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)
    return out


@triton.jit
def decay_sums(g):  # type: ignore[no-untyped-def]
    """log₂ exp(G) as the sum of a coarse and a fine part, of the logarithms g [C] of decays.

    The coarse are sums of at most 64 multiples of 2⁻¹⁰ between −128 and 0: they and their differences have at most 23
    bits and are exact. The fine are between 0 and 2⁻⁴. A token keeps 2⁻¹²⁸ of the state at least, which is nothing.
    """
    g = g * 1.4426950408889634
    g = tl.where(g < -128.0, -128.0, g)
    coarse = tl.floor(g * 1024.0) * (1 / 1024)
    return tl.cumsum(coarse, axis=0), tl.cumsum(g - coarse, axis=0)


@triton.jit
def unit_lower_inverse(A, C: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """(I + A)⁻¹ for the part of A [C, C] below its diagonal, C = 64.

    Let X hold the inverses of blocks on the diagonal, and N what A has below the first and beside the second of each
    two: X − X N X holds the inverses of blocks twice as large. All these are inverses, not powers, so that rounding
    does as little as in a substitution, however alike the keys are. Behind 16 rows, with D the inverses so far and N
    all of A below them, I + A = D⁻¹ (I + D N), and the fourth power of D N is 0:

        (I + A)⁻¹ = (I + (D N)²) (I − D N) D
    """
    B: tl.constexpr = 16
    BLOCKS: tl.constexpr = C // B
    block = tl.arange(0, BLOCKS)
    on_diagonal = block[:, None, None, None] == block[None, None, :, None]
    diagonal = tl.sum(tl.where(on_diagonal, tl.reshape(A, [BLOCKS, B, BLOCKS, B]), 0.0), axis=2)
    row, column = tl.arange(0, B)[None, :, None], tl.arange(0, B)[None, None, :]
    X = tl.where(row == column, 1.0, tl.where((row // 2 == column // 2) & (row > column), -diagonal, 0.0))
    for level in tl.static_range(1, 4):
        beside = ((row >> level) > (column >> level)) & (row >> (level + 1) == column >> (level + 1))
        N = tl.where(beside, diagonal, 0.0)
        X -= product(product(X, N, PRECISION), X, PRECISION)
    D = tl.reshape(tl.where(on_diagonal, X[:, :, None, :], 0.0), [C, C])
    index = tl.arange(0, C)
    N = tl.where(index[:, None] // B > index[None, :] // B, A, 0.0)
    power = product(D, N, PRECISION)
    near = D - product(power, D, PRECISION)
    power = product(power, power, PRECISION)
    return near + product(power, near, PRECISION)


@triton.jit(do_not_specialize=["sequences"])
def chunk_kernel(  # type: ignore[no-untyped-def]
    q, k, a, b, A_log, dt_bias, slots, query_start_loc, solve, attend, factors, decays,
    q_token, q_head, k_token, k_head, a_token, b_token, sequences,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr, SHORT: tl.constexpr,
    KEYS: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """M, P and the decays of one chunk of one value head: what does not depend on the state.

    Grid: (⌊T / 64⌋ + N) · HV, the heads of a chunk next to each other, which share q and k. Programs without a chunk,
    of which there are at most N · HV, end at once.

    Bytes of a chunk and value head, in 16 bits: 256 K for q and k, which a group of heads shares; 16 KiB for M and P.
    Operations: 6 · 64² K for the products of tokens, and 8 · 64³ for the inverse.

    Args:
        q, k: [T, H, K]; a, b: [T, HV]; slots: [N], query_start_loc: [N + 1].
        solve, attend: [chunks, HV, C, C] for M and P, in the dtype of the products of the walk.
        factors: [chunks, HV, 3, C] float32, what the rows of k Sᵀ, of q Sᵀ and of n are multiplied with: exp(G_i),
            exp(G_i) and exp(G_C − G_i), over the norm of the row of k, of q and of k.
        decays: [chunks, HV] float32, exp(G_C).
        PRECISION, INVERSE: of the products of tokens and of those of the inverse, as :func:`product` takes it.
    """
    program = tl.program_id(0)
    head = program % HV
    chunk = program // HV
    n = sequence_of_chunk(chunk, query_start_loc, sequences, C)
    start = tl.load(query_start_loc + n).to(tl.int64)
    end = tl.load(query_start_loc + n + 1).to(tl.int64)
    first = start + (chunk - (start // C + n)) * C
    if (end - first <= SHORT) | (tl.load(slots + n) < 0):
        return

    index = tl.arange(0, C)
    valid = index < tl.minimum(end - first, C).to(tl.int32)
    a = tl.load(a + first * a_token + head + index * a_token, mask=valid, other=0.0)
    b = tl.load(b + first * b_token + head + index * b_token, mask=valid, other=0.0)
    A, bias = tl.load(A_log + head).to(tl.float32), tl.load(dt_bias + head).to(tl.float32)
    # Some targets load the factors of products into registers, which hold only a part of the keys.
    keys = tl.arange(0, KEYS)
    key_head = head // (HV // H)
    q += first * q_token + key_head * q_head
    k += first * k_token + key_head * k_head
    inside = valid[:, None] & (keys[None, :] < K)
    qs = tl.load(q + index[:, None] * q_token + keys[None, :], mask=inside, other=0.0)
    ks = tl.load(k + index[:, None] * k_token + keys[None, :], mask=inside, other=0.0)

    coarse, fine = decay_sums(tl.where(valid, log_decay(a.to(tl.float32), A, bias), 0.0))
    last = tl.full([C], C - 1, tl.int32)
    from_start = tl.exp2(coarse + fine)
    to_end = tl.exp2((tl.gather(coarse, last, axis=0) - coarse) + (tl.gather(fine, last, axis=0) - fine))
    beta = tl.where(valid, write_strength(b.to(tl.float32)), 0.0)

    same = index[:, None] == index[None, :]
    q_squares = tl.zeros([C], tl.float32)
    attended, system = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for next_key in range(KEYS, BLOCK_K + KEYS, KEYS):
        # A product for its diagonal takes less than the sums of squares of rows, each of which lies in many threads.
        q_squares += tl.sum(tl.where(same, product(qs, tl.trans(qs), PRECISION), 0.0), axis=1)
        system += product(ks, tl.trans(ks), PRECISION)
        attended += product(qs, tl.trans(ks), PRECISION)
        if KEYS < BLOCK_K:
            inside = valid[:, None] & (next_key + keys[None, :] < K)
            qs = tl.load(q + index[:, None] * q_token + (next_key + keys)[None, :], mask=inside, other=0.0)
            ks = tl.load(k + index[:, None] * k_token + (next_key + keys)[None, :], mask=inside, other=0.0)
    q_norms = tl.rsqrt(q_squares + EPS) * (K**-0.5)
    k_norms = tl.rsqrt(tl.sum(tl.where(same, system, 0.0), axis=1) + EPS)

    entry = chunk.to(tl.int64) * HV + head
    vector = factors + entry * 3 * C + index
    # What is gathered lies in one thread a token; elsewhere it would be in each of the many that share its row.
    of_k, of_q = tl.gather(k_norms, index, axis=0), tl.gather(q_norms, index, axis=0)
    tl.store(vector, from_start * of_k)
    tl.store(vector + C, from_start * of_q)
    tl.store(vector + 2 * C, to_end * of_k)
    tl.store(decays + entry + index * 0, from_start, mask=index == C - 1)

    matrix = index[:, None] * C + index[None, :]
    between = tl.where(index[:, None] >= index[None, :], coarse[:, None] - coarse[None, :], float("-inf"))
    between = tl.exp2(between) * (tl.exp2(-fine) * k_norms)[None, :]
    attended = attended * between * (tl.exp2(fine) * q_norms)[:, None]
    tl.store(attend + entry * C * C + matrix, attended.to(attend.dtype.element_ty))
    # Gathered, β is computed once a token as well. Column j has it as a factor, which keeps the rows of tokens that
    # hardly write as accurate as all: (I + diag(β) L)⁻¹ diag(β) = diag(β) (I + L diag(β))⁻¹.
    beta = tl.gather(beta, index, axis=0)
    system = system * between * (tl.exp2(fine) * k_norms)[:, None] * beta[None, :]
    solved = unit_lower_inverse(system, C, INVERSE) * beta[:, None]
    tl.store(solve + entry * C * C + matrix, solved.to(solve.dtype.element_ty))


class Configuration:
    """Block sizes, warps and stages of the two kernels: from shapes, dtype and target, never from the batch."""

    def __init__(self, key_dim: int, value_dim: int, dtype: torch.dtype, target: Target) -> None:
        # float16 products of keys that are not normalised could overflow; its ten bits are those of tf32.
        self.products = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self.block_k = max(16, power_of_two(key_dim))
        # As many rows of a state as leave second factors registers, and 64 where these stay in shared memory.
        half = self.products == torch.bfloat16
        wide = half and target.tensor_maps and target.shared_memory > 200 << 10
        self.block_v = min(64 if wide else 32 if half and not target.nvidia else 16, max(16, power_of_two(value_dim)))
        self.state_warps = 8 if wide and not target.wgmma else 4
        stage = CHUNK_SIZE * (2 * self.block_k + 2 * CHUNK_SIZE + self.block_v) * self.products.itemsize
        # The next chunk is loaded during this one, and the one behind it where products read shared memory themselves.
        fit = target.shared_memory // (stage + STORED)
        self.stages = min(3, fit if wide else fit + 1) if target.nvidia and half else 1
        self.tiles = wide and key_dim == self.block_k and value_dim % self.block_v == 0
        self.precision = target.precision(dtype)
        self.chunk_warps = 4
        # No entry of an inverse is above 1: float16 keeps the bits of tf32, which would be cut off, at twice the speed.
        self.inverse = "float16" if dtype != torch.float32 else self.precision
        self.keys, self.chunk_options = min(128, self.block_k), {}
        if target.nvidia and target.shared_memory < 200 << 10:
            self.keys = min(32, self.block_k)
        elif target.nvidia and dtype == torch.bfloat16:
            # Four programs fill a multiprocessor.
            self.chunk_options = {"maxnreg": 128}
        if self.precision == "tf32x3":
            # Every factor is two there, in as many registers more.
            self.chunk_warps, self.keys, self.state_warps = 8, 16, 8


def solve_chunks(
    tokens: tuple[Tensor, ...], slots: Tensor, query_start_loc: Tensor, config: Configuration
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Launch :func:`chunk_kernel`; return solve, attend, factors and decays, and what the next kernels share with it.

    Of solve and attend, the rows of all chunks lie in one dimension. They are, in bfloat16, 16 KiB for every chunk and
    value head: 256 bytes a token and head.
    """
    q, k, v, a, b, A_log, dt_bias = tokens
    num_tokens, value_heads = v.shape[:2]
    key_heads, key_dim = q.shape[1:]
    sequences = slots.shape[0]
    entries = num_tokens // CHUNK_SIZE + sequences
    count = entries * value_heads
    solve = torch.empty(count * CHUNK_SIZE, CHUNK_SIZE, dtype=config.products, device=v.device)
    attend = torch.empty(count * CHUNK_SIZE, CHUNK_SIZE, dtype=config.products, device=v.device)
    factors = torch.empty(count, 3, CHUNK_SIZE, dtype=torch.float32, device=v.device)
    decays = torch.empty(count, dtype=torch.float32, device=v.device)
    shapes: dict[str, Any] = {
        "H": key_heads,
        "HV": value_heads,
        "K": key_dim,
        "BLOCK_K": config.block_k,
        "C": CHUNK_SIZE,
        "PRECISION": config.precision,
        "enable_fp_fusion": True,
    }
    launch(
        chunk_kernel, (count,),
        q, k, a, b, A_log, dt_bias, slots, query_start_loc, solve, attend, factors, decays,
        *q.stride()[:2], *k.stride()[:2], a.stride(0), b.stride(0), sequences,
        SHORT=RECURRENT_TOKENS, KEYS=config.keys, EPS=L2_NORM_EPS, INVERSE=config.inverse,
        num_warps=config.chunk_warps, num_stages=1, **config.chunk_options, **shapes,
    )  # fmt: skip
    return (solve, attend, factors, decays), shapes
