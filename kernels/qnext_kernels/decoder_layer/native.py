"""Parts of a decoder layer in one call of C++ each (``csrc/decoder_layer.cpp``).

A call is packed as the operations' own structs one behind the other; what one leaves to the next is null.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qnext_kernels.checks import INTEGERS, expect_indices
from qnext_kernels.dispatch import OPERATIONS
from qnext_kernels.gated_attention.results import empty_heads
from qnext_kernels.integers import INT4, INT8, columns_of, group_of
from qnext_kernels.linear.native import linear_fields
from qnext_kernels.moe.native import contiguous_gate, experts_fields
from qnext_kernels.native import DTYPES
from qnext_kernels.operators import operator
from qnext_kernels.quantized import reads_scale, stored_alike
from qnext_kernels.rows import floats, packed_function, rows

if TYPE_CHECKING:
    from qnext_kernels.decoder_layer import ExpertsWeights, LinearWeight


def serves(x: Tensor, *operations: str) -> bool:
    """Whether C++ serves all of these operations on tokens ``x``."""
    return x.is_cpu and all(OPERATIONS[name].select(x.device, x.dtype).name == "native" for name in operations)


def reads_norm(x: Tensor, residual: Tensor | None, weight: Tensor) -> bool:
    """Whether these fit each other and the kernel."""
    return (
        x.dim() == 2
        and weight.shape == x.shape[1:]
        and weight.dtype in DTYPES
        and weight.is_contiguous()
        and (residual is None or (residual.shape == x.shape and residual.dtype == x.dtype))
    )


def reads_linear(linear: LinearWeight, k: int, dtype: torch.dtype) -> bool:
    """Whether a linear of tokens [T, k] of ``dtype`` fits them and the kernel."""
    weight, bias, _, scale = linear
    fits = weight.dim() == 2 and columns_of(weight) == k and _reads_matrix(weight, scale, dtype)
    return fits and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == dtype and bias.is_contiguous()))


def _reads_matrix(weight: Tensor, scale: Tensor | None, dtype: torch.dtype, halves: int = 1) -> bool:
    """Whether the kernel reads a weight [..., N, K] with or without a scale along with tokens of ``dtype``."""
    if scale is None:
        return weight.dtype == dtype and weight.is_contiguous()
    return reads_scale(scale, weight, dtype, halves) and weight.is_contiguous() and scale.is_contiguous()


def reads_heads(
    tokens: int,
    qkv_rows: int,
    positions: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> bool:
    """Whether these fit the joint projection [tokens, qkv_rows] and the kernel."""
    head_dim = q_weight.shape[0]
    return (
        q_weight.dim() == 1
        and k_weight.shape == q_weight.shape
        and qkv_rows == 2 * (num_heads + num_kv_heads) * head_dim
        and positions.shape == (tokens,)
        and positions.dtype in INTEGERS
        and cos_sin.dim() == 2
        and cos_sin.shape[1] <= head_dim
        and cos_sin.shape[1] % 2 == 0
        and {q_weight.dtype, k_weight.dtype, cos_sin.dtype} <= DTYPES.keys()
    )


def reads_block(
    x: Tensor,
    gate: Tensor | None,
    out_proj: LinearWeight,
    residual: Tensor,
    norm_weight: Tensor,
    router: LinearWeight,
    moe: ExpertsWeights,
    top_k: int,
) -> bool:
    """Whether the arguments of :func:`linear_norm_experts` fit each other and the kernel."""
    if x.dim() != 2 or not reads_linear(out_proj, x.shape[1], x.dtype):
        return False
    w13, w2, _, shared, scales = moe
    hidden = out_proj.weight.shape[0]
    num_experts, double, _ = w13.shape if w13.dim() == 3 else (0, 0, 0)
    w13_scale, w2_scale = scales or (None, None)
    return (
        (gate is None or (gate.shape == x.shape and gate.dtype in DTYPES))
        and residual.shape == (x.shape[0], hidden)
        and residual.dtype == x.dtype
        and reads_norm(residual, None, norm_weight)
        and reads_linear(router, hidden, x.dtype)
        and router.weight.shape[0] == num_experts
        and 0 < top_k <= num_experts
        and columns_of(w13) == hidden
        and w2.shape[:-1] == (num_experts, hidden)
        and columns_of(w2) == double // 2
        and double % 2 == 0
        and w13.dtype != INT8
        and _reads_matrix(w13, w13_scale, x.dtype, halves=2)
        and _reads_matrix(w2, w2_scale, x.dtype)
        and stored_alike((w13, w13_scale), (w2, w2_scale))
        and (shared is None or _reads_shared(shared, hidden, x.dtype, (w13, w13_scale)))
    )


def _reads_shared(
    shared: Sequence[Tensor], hidden: int, dtype: torch.dtype, routed: tuple[Tensor, Tensor | None]
) -> bool:
    plain = len(shared) == 3
    w13, w13_scale, w2, w2_scale, gate = (shared[0], None, shared[1], None, shared[2]) if plain else shared
    double, beside = w13.shape[0], (w13, w13_scale)
    # Beside int4 it may be plain, or in int8 in groups of the same size.
    others = plain or (w13.dtype == INT8 and group_of(*beside) == group_of(*routed))
    return (
        w13.dim() == w2.dim() == 2
        and columns_of(w13) == hidden
        and double % 2 == 0
        and (w2.shape[0], columns_of(w2)) == (hidden, double // 2)
        and _reads_matrix(w13, w13_scale, dtype, halves=2)
        and _reads_matrix(w2, w2_scale, dtype)
        and stored_alike(beside, (w2, w2_scale))
        and (stored_alike(routed, beside) or (routed[0].dtype == INT4 and others))
        and gate.shape == (hidden,)
        and gate.dtype == dtype
    )


def _empty_linears(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    first: Tensor,
    first_bias: Tensor | None,
    first_packed: bool,
    first_scale: Tensor | None,
    second: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    return x.new_empty(tokens, first.shape[0]), x.new_empty(tokens, second.shape[0]), _empty_total(x, residual)


@operator(_empty_linears)
def norm_linears(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    first: Tensor,
    first_bias: Tensor | None,
    first_packed: bool,
    first_scale: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    second_packed: bool,
    second_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The public function on what the functions above allow; without a residual, the sum is empty."""
    tokens, dtype = x.shape[0], DTYPES[x.dtype]
    one = (first, first_bias, first_packed, first_scale)
    other = (second, second_bias, second_packed, second_scale)
    outs = _empty_linears(x, residual, norm_weight, eps, *one, *other)
    x, residual = unit_rows(x), None if residual is None else unit_rows(residual)
    added = NO_ROWS if residual is None else _token_rows(residual)
    _linears_kernel()(
        *norm_fields(_token_rows(x), added, norm_weight, outs[2].data_ptr(), tokens, eps),
        *linear_fields(*one, tokens, dtype, outs[0].data_ptr()),
        *linear_fields(*other, tokens, dtype, outs[1].data_ptr()),
    )
    return outs


def _empty_heads(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    qkv_packed: bool,
    qkv_scale: Tensor | None,
    positions: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads = empty_heads(x, positions, q_weight, k_weight, cos_sin, num_heads, num_kv_heads, eps)
    return *heads, _empty_total(x, residual)


@operator(_empty_heads)
def norm_heads(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    qkv_packed: bool,
    qkv_scale: Tensor | None,
    positions: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The public function on what the functions above allow; without a residual, the sum is empty."""
    norm, linear = (x, residual, norm_weight, eps), (qkv, qkv_bias, qkv_packed, qkv_scale)
    results = _empty_heads(*norm, *linear, positions, q_weight, k_weight, cos_sin, num_heads, num_kv_heads)
    q, k, v, gate, total = (result.data_ptr() for result in results)
    tokens = x.shape[0]
    x, residual = unit_rows(x), None if residual is None else unit_rows(residual)
    added = NO_ROWS if residual is None else _token_rows(residual)
    cos_sin, (table, table_dtype, _, table_stride) = rows(cos_sin)
    q_weight, k_weight, positions = q_weight.contiguous(), k_weight.contiguous(), positions.contiguous()
    if not _heads_kernel()(
        *norm_fields(_token_rows(x), added, norm_weight, total, tokens, eps),
        *linear_fields(*linear, tokens, DTYPES[x.dtype]),
        *(0, DTYPES[x.dtype], qkv.shape[0], positions.data_ptr(), positions.dtype == torch.int64),
        *(*floats(q_weight), *floats(k_weight), table, table_dtype, table_stride, q, k, v, gate),
        *(tokens, num_heads, num_kv_heads, q_weight.shape[0], cos_sin.shape[1], cos_sin.shape[0], eps),
    ):
        expect_indices("positions", positions, 0, cos_sin.shape[0])
    return results


def _empty_block(x: Tensor, gate: Tensor | None, out_proj: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    tokens, hidden = x.shape[0], out_proj.shape[0]
    return x.new_empty(tokens, hidden), x.new_empty(tokens, hidden)


@operator(_empty_block)
def linear_norm_experts(
    x: Tensor,
    gate: Tensor | None,
    out_proj: Tensor,
    out_bias: Tensor | None,
    out_packed: bool,
    out_scale: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    router: Tensor,
    router_bias: Tensor | None,
    router_packed: bool,
    router_scale: Tensor | None,
    w13: Tensor,
    w2: Tensor,
    scales: Sequence[Tensor],
    packed: bool,
    shared: Sequence[Tensor],
    top_k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """The public function on what :func:`reads_block` allows."""
    (tokens, width), (out, total), dtype = x.shape, _empty_block(x, gate, out_proj), DTYPES[x.dtype]
    out_linear = (out_proj, out_bias, out_packed, out_scale)
    x, residual = unit_rows(x), unit_rows(residual)
    gate_fields: tuple[int, ...] = (0,) * 13
    if gate is not None:
        gate = unit_rows(gate)
        gate_fields = *_token_rows(x), *_token_rows(gate), 0, 1, tokens, width, width
    _block_kernel()(
        *gate_fields,
        *linear_fields(*out_linear, tokens, dtype, 0, x.data_ptr(), x.stride(0)),
        *norm_fields(NO_ROWS, _token_rows(residual), norm_weight, total.data_ptr(), tokens, eps),
        *linear_fields(router, router_bias, router_packed, router_scale, tokens, dtype),
        *choice_fields(tokens, w13.shape[0], top_k, renormalize),
        *experts_fields(w13, w2, scales, packed, contiguous_gate(shared), top_k, tokens, dtype, out.data_ptr()),
    )
    return out, total


def _empty_total(x: Tensor, residual: Tensor | None) -> Tensor:
    return x.new_empty(0 if residual is None else x.shape[0], x.shape[1])


def unit_rows(x: Tensor) -> Tensor:
    """[T, D] with unit stride along D."""
    return x if x.stride(1) == 1 else x.contiguous()


def _token_rows(x: Tensor) -> tuple[int, int, int, int]:
    """The fields of ``Rows`` for [T, D]."""
    return x.data_ptr(), DTYPES[x.dtype], 0, x.stride(0)


def norm_fields(
    x: tuple[int, ...], residual: tuple[int, ...], weight: Tensor, total: int, tokens: int, eps: float
) -> tuple[float, ...]:
    """Those of ``RmsNorm``, whose result is the next operation's; ``x`` and ``residual`` are those of ``Rows``."""
    return *x, *residual, *floats(weight), 0, total, 1, tokens, weight.shape[0], eps


def choice_fields(tokens: int, num_experts: int, top_k: int, renormalize: bool) -> tuple[int, ...]:
    """Those of ``TopkSoftmax``, which reads and writes the neighbouring operations'."""
    return 0, 0, 0, 0, 0, 0, tokens, num_experts, top_k, renormalize


NO_ROWS = (0, 0, 0, 0)
NORM, LINEAR, HEADS, CHOICE, EXPERTS, GATE = "15qd", "13q", "22qd", "10q", "26q", "13q"
"""The structs' fields, as in :mod:`struct`."""
BLOCK = GATE + LINEAR + NORM + LINEAR + CHOICE + EXPERTS
_linears_kernel = cache(lambda: packed_function("qnext_norm_linears", NORM + LINEAR + LINEAR))
_heads_kernel = cache(lambda: packed_function("qnext_norm_heads", NORM + LINEAR + HEADS))
_block_kernel = cache(lambda: packed_function("qnext_linear_norm_experts", BLOCK))
