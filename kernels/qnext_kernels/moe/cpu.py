"""Vectorised PyTorch: one pair of matrix products an expert, over the tokens that chose it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext_kernels.dispatch import Backend, refuse_if_deterministic
from qnext_kernels.elementwise import silu


class CpuBackend(Backend):
    """Matrix products in the dtype of the weights, everything between them in float32.

    A token's bits may depend on how many other tokens chose the same expert: the BLAS behind ``F.linear`` picks its
    kernel by the number of rows.
    """

    name = "cpu"
    devices = ("cpu",)

    def topk_softmax(self, router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        weights, ids = torch.softmax(router_logits.float(), dim=-1).topk(top_k, dim=-1)
        if renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, ids.int()

    def silu_and_mul(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return (silu(gate.float()) * up.float()).to(x.dtype)

    def experts(self, x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        refuse_if_deterministic("moe", "PyTorch's linear")
        num_tokens, top_k = topk_ids.shape
        ids = topk_ids.reshape(-1).long()
        order = ids.argsort(stable=True)
        counts = torch.bincount(ids + 1, minlength=w13.shape[0] + 1).tolist()
        results = x.new_zeros(num_tokens * top_k, x.shape[1])
        start = counts[0]
        for e, count in enumerate(counts[1:]):
            if count:
                rows = order[start : start + count]
                middle = self.silu_and_mul(F.linear(x[rows // top_k], w13[e]))
                results[rows] = F.linear(middle, w2[e])
                start += count
        results = results.view(num_tokens, top_k, x.shape[1])
        # A skipped expert has no result; its weight may be anything.
        topk_weights = torch.where(topk_ids >= 0, topk_weights, 0)
        total = torch.zeros(x.shape, dtype=torch.float32)
        for j in range(top_k):
            total += results[:, j].float() * topk_weights[:, j, None]
        return total.to(x.dtype)
