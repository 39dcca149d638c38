"""Mixture of experts: router top-k, the routed experts, SwiGLU.

Source: transformers' ``Qwen3NextTopKRouter``, ``Qwen3NextExperts`` and ``Qwen3NextMLP``. The shared expert is SwiGLU
between two linears of the engine, scaled by :func:`qnext_kernels.sigmoid_gate` of its gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.checks import expect_dtype, expect_floating, expect_indices, expect_shape
from qnext_kernels.dispatch import Operation
from qnext_kernels.linear import expect_reads_packed, pack_weight_, unpack_weight_
from qnext_kernels.linear.native import packable
from qnext_kernels.moe.cpu import CpuBackend
from qnext_kernels.moe.native import MoeNative
from qnext_kernels.moe.reference import ReferenceBackend
from qnext_kernels.moe.triton import TritonMoe

operation = Operation("moe", [MoeNative(), CpuBackend(), TritonMoe(), ReferenceBackend()])


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
    expect_shape("router_logits", router_logits, (None, None))
    expect_floating("router_logits", router_logits)
    if not 1 <= top_k <= router_logits.shape[1]:
        raise ValueError(f"top_k: expected 1 to {router_logits.shape[1]} (the experts), got {top_k}")
    return operation.select(router_logits.device, router_logits.dtype).topk_softmax(router_logits, top_k, renormalize)


def silu_and_mul(x: Tensor) -> Tensor:
    """SwiGLU's middle: SiLU(gate) · up, computed in float32 and rounded once.

    Args:
        x: [..., 2·I], gate then up.

    Returns:
        [..., I] in the dtype of ``x``.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    expect_floating("x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"x: expected an even last dimension, gate then up, got {x.shape[-1]}")
    return operation.select(x.device, x.dtype).silu_and_mul(x)


def experts(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, packed: bool = False) -> Tensor:
    """Σ_j topk_weights[t, j] · down_e(SiLU(gate_e x_t) · up_e x_t) over the chosen experts e = topk_ids[t, j].

    Args:
        x: [T, D], any float dtype.
        w13: [E, 2·I, D], each expert's gate projection, then its up projection, in the dtype of ``x``.
        w2: [E, D, I], the down projections, in the dtype of ``x``.
        topk_weights: [T, top_k] float32.
        topk_ids: [T, top_k] int32 or int64; −1 (an expert of another rank) is skipped.
        packed: whether :func:`pack_experts_` has packed the weights.

    Returns:
        [T, D] in the dtype of ``x``; a token's sum over its experts runs in float32, in an order that depends on
        nothing but its ``topk_ids``.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit.
        BackendError: the backend that serves does not read packed weights.
    """
    return torch.ops.qnext.experts(x, w13, w2, topk_weights, topk_ids, packed)


def pack_experts_(w13: Tensor, w2: Tensor) -> bool:
    """Pack the experts' weights in place (:func:`qnext_kernels.pack_weight_`), gate, up and down projections apart.

    Args:
        w13: [E, 2·I, D], written in place.
        w2: [E, D, I], written in place.

    Returns:
        Whether both are packed now; else neither is.
    """
    if not (packable(w13) and packable(w2)) or operation.select(w13.device, w13.dtype).name != MoeNative.name:
        return False
    return pack_weight_(w13.unflatten(1, (2, -1))) and pack_weight_(w2)


def unpack_experts_(w13: Tensor, w2: Tensor) -> None:
    """Undo :func:`pack_experts_` in place."""
    unpack_weight_(w13.unflatten(1, (2, -1)))
    unpack_weight_(w2)


def _experts(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, packed: bool) -> Tensor:
    expect_shape("x", x, (None, None))
    expect_floating("x", x)
    expect_shape("w13", w13, (None, None, x.shape[1]))
    expect_dtype("w13", w13, (x.dtype,))
    num_experts, double, hidden = w13.shape
    if double % 2:
        raise ValueError(f"w13: expected an even number of rows an expert, gate then up, got {double}")
    expect_shape("w2", w2, (num_experts, hidden, double // 2))
    expect_dtype("w2", w2, (x.dtype,))
    expect_shape("topk_weights", topk_weights, (x.shape[0], None))
    expect_dtype("topk_weights", topk_weights, (torch.float32,))
    expect_shape("topk_ids", topk_ids, topk_weights.shape)
    expect_indices("topk_ids", topk_ids, -1, num_experts)
    backend = operation.select(x.device, x.dtype)
    if packed:
        expect_reads_packed(backend)
        return backend.experts_packed(x, w13, w2, topk_weights, topk_ids)
    return backend.experts(x, w13, w2, topk_weights, topk_ids)


def _experts_fake(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, packed: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# One opaque operator: which tokens go to which expert is data that torch.compile must not trace.
_library = torch.library.Library("qnext", "FRAGMENT")
_library.define("experts(Tensor x, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, bool packed) -> Tensor")
_library.impl("experts", _experts, "CompositeExplicitAutograd")
torch.library.register_fake("qnext::experts", _experts_fake, lib=_library)
