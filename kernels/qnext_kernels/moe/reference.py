"""The definition of routing and experts: one token at a time, one expert at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext_kernels.dispatch import Backend
from qnext_kernels.elementwise import sigmoid, silu

FP8_GROUP = 128
"""Rows and columns of FP8 weights, and columns of activations, that share a scale."""
FP8_MAX = 448.0
"""The largest number of e4m3."""
FP8_TINY = 1e-10
"""A group of activations is scaled as if its largest magnitude were at least this."""


def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each group of FP8_GROUP columns to e4m3, scaled so that its largest magnitude becomes 448.

    Args:
        x: [..., D], any float dtype.

    Returns:
        [..., D] float8_e4m3fn and scales [..., ceil(D / FP8_GROUP)] float32: x ≈ quantized · scale.
    """
    size = x.shape[-1]
    groups = -(-size // FP8_GROUP)
    padded = F.pad(x.float(), (0, groups * FP8_GROUP - size)).unflatten(-1, (groups, FP8_GROUP))
    largest = padded.abs().amax(dim=-1).clamp(min=FP8_TINY)
    # By a tensor: on a GPU, PyTorch multiplies by a number's reciprocal, which rounds twice.
    scales = largest / largest.new_tensor(FP8_MAX)
    quantized = (padded / scales[..., None]).clamp(-FP8_MAX, FP8_MAX)
    return quantized.flatten(-2)[..., :size].to(torch.float8_e4m3fn), scales


def dequantize_groups(quantized: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What :func:`quantize_groups` returned as [..., D] of a dtype."""
    return quantized.to(dtype) * scales.repeat_interleave(FP8_GROUP, dim=-1)[..., : quantized.shape[-1]].to(dtype)


def dequantize_blocks(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., N, K] in e4m3 with a scale for each block of FP8_GROUP² elements as [..., N, K] of a dtype.

    Args:
        weight: [..., N, K] float8_e4m3fn.
        scale: [..., ceil(N / FP8_GROUP), ceil(K / FP8_GROUP)] float32, ``weight_scale_inv`` of a checkpoint.
    """
    rows, columns = weight.shape[-2:]
    for dim, size in ((-2, rows), (-1, columns)):
        scale = scale.repeat_interleave(FP8_GROUP, dim=dim).narrow(dim, 0, size)
    return weight.to(dtype) * scale.to(dtype)


def dequantize_w13(w13: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`dequantize_blocks` of gate and up projections, [..., 2·I, K], whose blocks are apart."""
    blocks = dequantize_blocks(w13.unflatten(-2, (2, -1)), scale.unflatten(-2, (2, -1)), dtype)
    return blocks.flatten(-3, -2)


class ReferenceBackend(Backend):
    """Readable PyTorch, in float32 (float64 for float64 inputs)."""

    name = "reference"

    def topk_softmax(self, router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(router_logits.dtype, torch.float32)
        probabilities = torch.softmax(router_logits.to(dtype), dim=-1)
        weights, ids = probabilities.topk(top_k, dim=-1)
        if renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.float(), ids.int()

    def silu_and_mul(self, x: Tensor) -> Tensor:
        gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
        return (silu(gate) * up).to(x.dtype)

    def experts(self, x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        out = torch.zeros(x.shape, dtype=dtype, device=x.device)
        for t in range(x.shape[0]):
            for weight, e in zip(topk_weights[t].to(dtype), topk_ids[t].tolist(), strict=True):
                if e >= 0:
                    middle = self.silu_and_mul(w13[e].to(dtype) @ x[t].to(dtype))
                    out[t] += weight * (w2[e].to(dtype) @ middle)
        return out.to(x.dtype)

    def experts_with_shared(
        self,
        x: Tensor,
        w13: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        tokens = x.to(dtype)
        shared_w13, shared_w2, gate = (tensor.to(dtype) for tensor in shared)
        routed = self.experts(tokens, w13.to(dtype), w2.to(dtype), topk_weights, topk_ids)
        extra = self.silu_and_mul(tokens @ shared_w13.T) @ shared_w2.T
        return (routed + sigmoid(tokens @ gate)[:, None] * extra).to(x.dtype)

    def experts_fp8(
        self,
        x: Tensor,
        w13: Tensor,
        w13_scale: Tensor,
        w2: Tensor,
        w2_scale: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None,
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)

        def requantized(values: Tensor) -> Tensor:
            return dequantize_groups(*quantize_groups(values), dtype)

        def expert(t: int, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor) -> Tensor:
            both = dequantize_w13(w13, w13_scale, dtype) @ requantized(x[t])
            middle = requantized(self.silu_and_mul(both).to(x.dtype))
            return dequantize_blocks(w2, w2_scale, dtype) @ middle

        out = torch.zeros(x.shape, dtype=dtype, device=x.device)
        for t in range(x.shape[0]):
            for weight, e in zip(topk_weights[t].to(dtype), topk_ids[t].tolist(), strict=True):
                if e >= 0:
                    out[t] += weight * expert(t, w13[e], w13_scale[e], w2[e], w2_scale[e])
            if shared is not None:
                strength = sigmoid(x[t].to(dtype) @ shared[4].to(dtype))
                out[t] += strength * expert(t, *shared[:4])
        return out.to(x.dtype)
