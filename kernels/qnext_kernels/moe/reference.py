"""The definition of routing and experts: one token at a time, one expert at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import Backend
from qnext_kernels.elementwise import sigmoid, silu
from qnext_kernels.fp8 import dequantize_groups, quantize_groups
from qnext_kernels.quantized import SharedWeights, dequantize


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

    def experts_scaled(
        self,
        x: Tensor,
        w13: Tensor,
        w13_scale: Tensor,
        w2: Tensor,
        w2_scale: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared: SharedWeights | None,
        quantize: bool,
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)

        def activations(values: Tensor) -> Tensor:
            if not quantize:
                return values.to(dtype)
            return dequantize_groups(*quantize_groups(values.to(x.dtype)), dtype)

        def expert(t: int, w13: Tensor, w13_scale: Tensor | None, w2: Tensor, w2_scale: Tensor | None) -> Tensor:
            both = dequantize(w13, w13_scale, dtype, halves=2) @ activations(x[t])
            middle = activations(self.silu_and_mul(both))
            return dequantize(w2, w2_scale, dtype) @ middle

        out = torch.zeros(x.shape, dtype=dtype, device=x.device)
        for t in range(x.shape[0]):
            for weight, e in zip(topk_weights[t].to(dtype), topk_ids[t].tolist(), strict=True):
                if e >= 0:
                    out[t] += weight * expert(t, w13[e], w13_scale[e], w2[e], w2_scale[e])
            if shared is not None:
                strength = sigmoid(x[t].to(dtype) @ shared[4].to(dtype))
                out[t] += strength * expert(t, *shared[:4])
        return out.to(x.dtype)
