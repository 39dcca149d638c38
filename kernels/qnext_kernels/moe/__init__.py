"""Mixture of experts: router top-k, the routed experts, SwiGLU.

Source: transformers' ``Qwen3NextTopKRouter``, ``Qwen3NextExperts`` and ``Qwen3NextMLP``. The shared expert is computed
along with the routed ones, or is SwiGLU between two linears of the engine and :func:`qnext_kernels.sigmoid_gate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qnext_kernels.checks import INTEGERS, expect_dtype, expect_floating, expect_indices, expect_shape
from qnext_kernels.dispatch import BackendError, Call, Operation
from qnext_kernels.fp8 import FP8
from qnext_kernels.integers import GROUPED, INT4, group_of
from qnext_kernels.layouts import once_per_layout
from qnext_kernels.moe.cpu import CpuBackend
from qnext_kernels.moe.flashinfer import FlashInferMoe
from qnext_kernels.moe.native import MoeNative
from qnext_kernels.moe.reference import ReferenceBackend
from qnext_kernels.moe.triton import TritonMoe
from qnext_kernels.operators import operator
from qnext_kernels.quantized import SCALED, SharedWeights, expect_scale, stored_columns

PACKING = (MoeNative.name, FlashInferMoe.name)
"""Backends that read weights laid out otherwise than in a checkpoint."""
READING_INT4 = (MoeNative.name, CpuBackend.name, ReferenceBackend.name)
operation = Operation("moe", [MoeNative(), CpuBackend(), TritonMoe(), FlashInferMoe(), ReferenceBackend()])


def topk_softmax(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Softmax over all experts in float32, then the ``top_k`` largest.

    Args:
        router_logits: [T, E], any float dtype.
        top_k: experts a token, 1 to E.
        renormalize: divide the chosen probabilities by their sum (``norm_topk_prob``).

    Returns:
        Weights [T, top_k] float32, largest first, and expert indices [T, top_k] int32.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    return _router_backend(router_logits, top_k).topk_softmax(router_logits, top_k, renormalize)


def silu_and_mul(x: Tensor) -> Tensor:
    """SwiGLU's middle: SiLU(gate) · up, computed in float32 and rounded once.

    Args:
        x: [..., 2·I], gate then up.

    Returns:
        [..., I] in the dtype of ``x``.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    return _swiglu_backend(x).silu_and_mul(x)


def experts(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    packed: bool = False,
    shared: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Σ_j topk_weights[t, j] · down_e(SiLU(gate_e x_t) · up_e x_t) over the chosen experts e = topk_ids[t, j].

    With a shared expert, + sigmoid(g · x_t) · down(SiLU(gate x_t) · up x_t) of that (``Qwen3NextSparseMoeBlock``).

    Args:
        x: [T, D], any float dtype.
        w13: [E, 2·I, D], each expert's gate projection, then its up projection, in the dtype of ``x``.
        w2: [E, D, I], the down projections, in the dtype of ``x``.
        topk_weights: [T, top_k] float32.
        topk_ids: [T, top_k] int32 or int64; −1 (an expert of another rank) is skipped.
        packed: whether :func:`pack_experts_` has packed the weights, those of a shared expert too.
        shared: of the shared expert, w13 [2·S, D], w2 [D, S] and its gate g [D], in the dtype of ``x``; or None.

    Returns:
        [T, D] in the dtype of ``x``; a token's sum over its experts runs in float32, in an order that depends on
        nothing but its ``topk_ids``.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit.
        BackendError: the backend that serves does not read packed weights.
    """
    if shared is None:
        return _experts(x, w13, w2, topk_weights, topk_ids, packed)
    return _experts_with_shared(x, w13, w2, topk_weights, topk_ids, shared, packed)


def experts_fp8(
    x: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    packed: bool = False,
    shared: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None,
    quantize_activations: bool = True,
) -> Tensor:
    """:func:`experts` over block-wise FP8 weights (transformers' fine-grained FP8, the ``-FP8`` checkpoints).

    Activations, x and what comes out of SwiGLU, are quantized on the way: each group of 128 columns of a token is
    divided by its largest magnitude over 448 and rounded to e4m3. Products of e4m3 are summed up by groups, and
    multiplied with the scales of both groups, in float32. Where they are not quantized (W8A16), their products with
    e4m3 are summed up by blocks of 128 columns, and multiplied with the block's scale, in float32.

    Args:
        x: [T, D], any float dtype.
        w13: [E, 2·I, D] float8_e4m3fn, each expert's gate projection, then its up projection.
        w13_scale: [E, 2·ceil(I / 128), ceil(D / 128)] float32, ``weight_scale_inv`` of the gate projection, then of the
            up projection: what a block of 128 rows and 128 columns is multiplied with.
        w2: [E, D, I] float8_e4m3fn, the down projections.
        w2_scale: [E, ceil(D / 128), ceil(I / 128)] float32.
        topk_weights: [T, top_k] float32.
        topk_ids: [T, top_k] int32 or int64; −1 (an expert of another rank) is skipped.
        packed: whether :func:`pack_experts_fp8_` has packed the weights, those of a shared expert too.
        shared: of the shared expert, w13 [2·S, D], w13_scale, w2 [D, S], w2_scale as those of one expert, and its gate
            [D] in the dtype of ``x``; or None.
        quantize_activations: the kernels for GPUs always do, C++ over packed weights never.

    Returns:
        [T, D] in the dtype of ``x``, summed up as by :func:`experts`.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit.
        BackendError: the backend that serves does not read packed weights, or does not treat activations so.
    """
    weights = w13, w13_scale, w2, w2_scale
    return _experts_scaled(x, *weights, topk_weights, topk_ids, FP8, packed, shared or (), quantize_activations)


def experts_int4(
    x: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    packed: bool = False,
    shared: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """:func:`experts` over group-wise int4 weights (W4A16, compressed-tensors' ``pack-quantized``), on a CPU.

    Activations are not quantized: their products with int4 are summed up by groups, and multiplied with the group's
    scale, in float32.

    Args:
        x: [T, D], any float dtype.
        w13: [E, 2·I, D / 8] int32, eight columns in a number, the first in its lowest bits, as themselves + 8; each
            expert's gate projection, then its up projection.
        w13_scale: [E, 2·I, D / group] in the dtype of ``x``, what 32, 64 or 128 columns of a row are multiplied with.
        w2: [E, D, I / 8] int32, the down projections.
        w2_scale: [E, D, I / group] in the dtype of ``x``.
        topk_weights: [T, top_k] float32.
        topk_ids: [T, top_k] int32 or int64; −1 (an expert of another rank) is skipped.
        packed: whether :func:`pack_experts_int4_` has packed weights and scales, those of a shared expert too.
        shared: of the shared expert, w13 [2·S, D / 8], w13_scale, w2 [D, S / 8], w2_scale as those of one expert, or
            w13 [2·S, D] and w2 [D, S] uint8 in int8, groups of that size, and its gate [D] in the dtype of ``x``; or
            w13 [2·S, D], w2 [D, S] and gate in that dtype; or None.

    Returns:
        [T, D] in the dtype of ``x``, summed up as by :func:`experts`.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit.
        BackendError: the backend that serves does not read int4, or no packed weights.
    """
    weights = w13, w13_scale, w2, w2_scale
    return _experts_scaled(x, *weights, topk_weights, topk_ids, INT4, packed, shared or (), False)


def pack_experts_(w13: Tensor, w2: Tensor, shared: tuple[Tensor, Tensor] | None = None) -> bool:
    """Lay the experts' weights out in place for the backend that serves them, where it reads them otherwise.

    On a CPU that is :func:`qnext_kernels.pack_weight_`, gate, up and down projections apart; for FlashInfer, which has
    no shared expert, each up projection comes before its gate. Only that backend reads them then.

    Args:
        w13: [E, 2·I, D], written in place.
        w2: [E, D, I], written in place.
        shared: w13 [2·S, D] and w2 [D, S] of the shared expert, written in place; or None.

    Returns:
        Whether all are packed now; else none is.

    Raises:
        BackendError: a backend that ``QNEXT_BACKEND`` forces does not serve them.
    """
    expect_floating("w13", w13)
    return _pack(w13.dtype, "experts", w13, w2, shared=shared)


def unpack_experts_(w13: Tensor, w2: Tensor, shared: tuple[Tensor, Tensor] | None = None) -> None:
    """Undo :func:`pack_experts_` in place; raises BackendError where the backend does not read packed weights."""
    _expect_packing(operation.select(w13.device, w13.dtype)).unpack_experts_(w13, w2, shared=shared)


def pack_experts_fp8_(
    w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, shared: tuple[Tensor, Tensor] | None = None
) -> bool:
    """:func:`pack_experts_` of weights and scales in block-wise FP8, and w13 and w2 of a shared expert in FP8.

    FlashInfer's are for activations in bfloat16 that are quantized, those of C++ for any that are not.
    """
    for name, weight in (("w13", w13), ("w2", w2)):
        expect_dtype(name, weight, (FP8,))
    return _pack(torch.bfloat16, "experts_fp8", w13, w13_scale, w2, w2_scale, shared=shared)


def unpack_experts_fp8_(
    w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, shared: tuple[Tensor, Tensor] | None = None
) -> None:
    """Undo :func:`pack_experts_fp8_` in place."""
    weights = w13, w13_scale, w2, w2_scale
    _expect_packing(operation.select(w13.device, torch.bfloat16)).unpack_experts_(*weights, shared=shared)


def pack_experts_int4_(
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    shared: tuple[Tensor, ...] | None = None,
) -> bool:
    """:func:`pack_experts_` of weights in int4 and of their scales, which are written in place too.

    Args:
        shared: w13, w13_scale, w2 and w2_scale of the shared expert in int4 or int8, or w13 and w2 without scales, or
            None.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been written.
    """
    expect_floating("w13_scale", w13_scale)
    for prefix, stored, dtypes in (("", (w13, w13_scale, w2, w2_scale), (INT4,)), ("shared_", shared or (), GROUPED)):
        if len(stored) == 4:
            expect_dtype(f"{prefix}w13", stored[0], dtypes)
            expect_dtype(f"{prefix}w2", stored[2], (stored[0].dtype,))
            _expect_scales(*stored, w13_scale.dtype, prefix)
        else:
            for name, weight in zip(("w13", "w2"), stored, strict=False):
                expect_floating(f"{prefix}{name}", weight)
    return _pack(w13_scale.dtype, "experts_int4", w13, w13_scale, w2, w2_scale, shared=shared)


def unpack_experts_int4_(
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    shared: tuple[Tensor, ...] | None = None,
) -> None:
    """Undo :func:`pack_experts_int4_` in place."""
    weights = w13, w13_scale, w2, w2_scale
    _expect_packing(operation.select(w13.device, w13_scale.dtype)).unpack_experts_(*weights, shared=shared)


def _pack(dtype: torch.dtype, method: str, *weights: Tensor, shared: tuple[Tensor, ...] | None = None) -> bool:
    device, w2 = weights[0].device, weights[len(weights) // 2]
    backend = operation.select(device, dtype)
    if backend.name not in PACKING:
        return False
    # Weights are laid out once, for calls of any number of tokens.
    reason = backend.supports_call(device, dtype, Call(method, tokens=0, shape=tuple(w2.shape[1:])))
    if reason is not None:
        raise BackendError(f"{backend.name} does not serve moe.{method} on {device} with {dtype}: {reason}")
    return backend.pack_experts_(*weights, shared=shared)  # type: ignore[no-any-return]


def _expect_packing(backend: Any) -> Any:
    """The backend; raises BackendError unless it reads packed weights."""
    if backend.name not in PACKING:
        raise BackendError(f"packed: backend {backend.name} reads weights as the checkpoint stores them")
    return backend


def _like_x(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# Opaque operators: which tokens go to which expert is data that torch.compile must not trace.
@operator(_like_x, name="experts")
def _experts(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, packed: bool) -> Tensor:
    backend = _expect_experts(x, w13, w2, topk_weights, topk_ids, x.dtype)
    if packed:
        return _expect_packing(backend).experts_packed(x, w13, w2, topk_weights, topk_ids)
    return backend.experts(x, w13, w2, topk_weights, topk_ids)


@operator(_like_x, name="experts_with_shared")
def _experts_with_shared(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared: Sequence[Tensor],
    packed: bool,
) -> Tensor:
    backend = _expect_experts(x, w13, w2, topk_weights, topk_ids, x.dtype)
    shared_w13, shared_w2, gate = shared
    _expect_shared(x, shared_w13, shared_w2, gate, x.dtype)
    if packed:
        if backend.name != MoeNative.name:
            raise BackendError(f"packed: backend {backend.name} reads a shared expert as the checkpoint stores it")
        return backend.run(x, w13, w2, topk_weights, topk_ids, (shared_w13, shared_w2, gate), packed=True)
    return backend.experts_with_shared(x, w13, w2, topk_weights, topk_ids, tuple(shared))


@operator(_like_x, name="experts_scaled")
def _experts_scaled(
    x: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    stored: torch.dtype,
    packed: bool,
    shared: Sequence[Tensor],
    quantize: bool,
) -> Tensor:
    backend = _expect_experts(x, w13, w2, topk_weights, topk_ids, stored)
    if stored == INT4 and backend.name not in READING_INT4:
        raise BackendError(f"w13: backend {backend.name} does not read int4")
    _expect_scales(w13, w13_scale, w2, w2_scale, x.dtype)
    scaled = {"w2_scale": (w2, w2_scale)}
    extra: SharedWeights | None = None
    if stored == INT4 and len(shared) == 3:
        shared_w13, shared_w2, gate = shared
        _expect_shared(x, shared_w13, shared_w2, gate, x.dtype)
        extra = shared_w13, None, shared_w2, None, gate
    elif shared:
        shared_w13, shared_w13_scale, shared_w2, shared_w2_scale, gate = extra = tuple(shared)  # type: ignore[assignment]
        expect_dtype("shared_w13", shared_w13, GROUPED if stored == INT4 else (stored,))
        _expect_shared(x, shared_w13, shared_w2, gate, shared_w13.dtype)
        _expect_scales(shared_w13, shared_w13_scale, shared_w2, shared_w2_scale, x.dtype, "shared_")
        scaled["shared_w13_scale"] = shared_w13, shared_w13_scale
        scaled["shared_w2_scale"] = shared_w2, shared_w2_scale
    expected = group_of(w13, w13_scale)
    for name, other in scaled.items():
        if (group := group_of(*other)) != expected:
            raise ValueError(f"{name}: expected groups of {expected} columns, as w13 has them, got {group}")
    arguments = (x, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, extra, quantize)
    return _expect_packing(backend).experts_scaled_packed(*arguments) if packed else backend.experts_scaled(*arguments)


@once_per_layout
def _router_backend(router_logits: Tensor, top_k: int) -> Any:
    """Check the arguments of a router; return the backend for them."""
    expect_shape("router_logits", router_logits, (None, None))
    expect_floating("router_logits", router_logits)
    if not 1 <= top_k <= router_logits.shape[1]:
        raise ValueError(f"top_k: expected 1 to {router_logits.shape[1]} (the experts), got {top_k}")
    return operation.select(router_logits.device, router_logits.dtype)


@once_per_layout
def _swiglu_backend(x: Tensor) -> Any:
    """Check the argument of SwiGLU's middle; return the backend for it."""
    expect_floating("x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"x: expected an even last dimension, gate then up, got {x.shape[-1]}")
    return operation.select(x.device, x.dtype)


@once_per_layout
def _expect_experts(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, dtype: torch.dtype
) -> Any:
    """Check what all calls have; return the backend. The native one's kernel checks the ids that it reads itself."""
    expect_shape("x", x, (None, None))
    expect_floating("x", x)
    expect_shape("w13", w13, (None, None, stored_columns("x", x.shape[1], dtype)))
    expect_dtype("w13", w13, (dtype,))
    num_experts, double, _ = w13.shape
    if double % 2:
        raise ValueError(f"w13: expected an even number of rows an expert, gate then up, got {double}")
    expect_shape("w2", w2, (num_experts, x.shape[1], stored_columns("w13", double // 2, dtype)))
    expect_dtype("w2", w2, (dtype,))
    expect_shape("topk_weights", topk_weights, (x.shape[0], None))
    expect_dtype("topk_weights", topk_weights, (torch.float32,))
    expect_shape("topk_ids", topk_ids, topk_weights.shape)
    expect_dtype("topk_ids", topk_ids, INTEGERS)
    backend = operation.select(x.device, x.dtype)
    if dtype in SCALED or backend.name != MoeNative.name:
        expect_indices("topk_ids", topk_ids, -1, num_experts)
    return backend


@once_per_layout
def _expect_shared(x: Tensor, w13: Tensor, w2: Tensor, gate: Tensor, dtype: torch.dtype) -> None:
    hidden = x.shape[1]
    for name, weight in (("shared_w13", w13), ("shared_w2", w2)):
        expect_dtype(name, weight, (dtype,))
    expect_shape("shared_w13", w13, (None, stored_columns("x", hidden, dtype)))
    if w13.shape[0] % 2:
        raise ValueError(f"shared_w13: expected an even number of rows, gate then up, got {w13.shape[0]}")
    expect_shape("shared_w2", w2, (hidden, stored_columns("shared_w13", w13.shape[0] // 2, dtype)))
    expect_shape("shared_gate", gate, (hidden,))
    expect_dtype("shared_gate", gate, (x.dtype,))


@once_per_layout
def _expect_scales(
    w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, dtype: torch.dtype, prefix: str = ""
) -> None:
    expect_scale(f"{prefix}w13_scale", w13_scale, w13, dtype, halves=2)
    expect_scale(f"{prefix}w2_scale", w2_scale, w2, dtype)
