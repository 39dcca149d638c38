"""Vectorised PyTorch: one pair of matrix products an expert, over the tokens that chose it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext_kernels.dispatch import Backend, refuse_if_deterministic
from qnext_kernels.elementwise import sigmoid, silu
from qnext_kernels.fp8 import dequantize_groups, quantize_groups
from qnext_kernels.quantized import SharedWeights, dequantize


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

        def expert(e: int, tokens: Tensor) -> Tensor:
            return F.linear(self.silu_and_mul(F.linear(x[tokens], w13[e])), w2[e])

        return _weighted_sum(x, topk_weights, topk_ids, w13.shape[0], expert).to(x.dtype)

    def experts_with_shared(
        self,
        x: Tensor,
        w13: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        shared_w13, shared_w2, gate = shared
        routed = self.experts(x, w13, w2, topk_weights, topk_ids)
        strength = sigmoid(F.linear(x, gate[None]).float())
        # One expert that every token chooses.
        zeros = torch.zeros_like(strength, dtype=torch.int32)
        return routed + self.experts(x, shared_w13[None], shared_w2[None], strength, zeros)

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
        refuse_if_deterministic("moe", "PyTorch's linear")

        def activations(values: Tensor) -> Tensor:
            if not quantize:
                return values.float()
            return dequantize_groups(*quantize_groups(values.to(x.dtype)), torch.float32)

        hidden = activations(x)

        def swiglu(
            hidden: Tensor, w13: Tensor, w13_scale: Tensor | None, w2: Tensor, w2_scale: Tensor | None
        ) -> Tensor:
            both = F.linear(hidden, dequantize(w13, w13_scale, torch.float32, halves=2))
            middle = activations(self.silu_and_mul(both))
            return F.linear(middle, dequantize(w2, w2_scale, torch.float32))

        def expert(e: int, tokens: Tensor) -> Tensor:
            return swiglu(hidden[tokens], w13[e], w13_scale[e], w2[e], w2_scale[e])

        total = _weighted_sum(hidden, topk_weights, topk_ids, w13.shape[0], expert)
        if shared is not None:
            total += sigmoid(F.linear(x.float(), shared[4].float()[None])) * swiglu(hidden, *shared[:4])
        return total.to(x.dtype)


def _weighted_sum(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, num_experts: int, expert: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Σ_j topk_weights[t, j] · expert(e, tokens)[t] in float32, an expert's tokens together."""
    num_tokens, top_k = topk_ids.shape
    ids = topk_ids.reshape(-1).long()
    order = ids.argsort(stable=True)
    counts = torch.bincount(ids + 1, minlength=num_experts + 1).tolist()
    results = x.new_zeros(num_tokens * top_k, x.shape[1])
    start = counts[0]
    for e, count in enumerate(counts[1:]):
        if count:
            rows = order[start : start + count]
            results[rows] = expert(e, rows // top_k)
            start += count
    results = results.view(num_tokens, top_k, x.shape[1])
    # A skipped expert has no result; its weight may be anything.
    topk_weights = torch.where(topk_ids >= 0, topk_weights, 0)
    total = torch.zeros(x.shape, dtype=torch.float32)
    for j in range(top_k):
        total += results[:, j].float() * topk_weights[:, j, None]
    return total
