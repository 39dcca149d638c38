"""The definition of routing and experts: one token at a time, one expert at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import Backend
from qnext_kernels.elementwise import silu


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
