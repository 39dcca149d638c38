"""PyTorch itself as a peer on GPUs: grouped and plain GEMMs, attention, and Inductor for what is elementwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qnext_plugins.cli.bench.elementwise import rope_table
from qnext_plugins.cli.bench.inputs import Library

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def grouped_experts(w13: Tensor, w2: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Routed experts by two grouped GEMMs over tokens in the order of their experts, without a sum in random order."""
    experts = torch.arange(len(w13), device=w13.device)

    def run(out: Tensor, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        top_k = ids.shape[1]
        sorted_ids, order = ids.flatten().sort(stable=True)
        ends = torch.searchsorted(sorted_ids.long(), experts, right=True).int()
        middle = functional.grouped_mm(x[order // top_k], w13.transpose(1, 2), offs=ends)
        gate, up = middle.chunk(2, dim=1)
        down = functional.grouped_mm(functional.silu(gate) * up, w2.transpose(1, 2), offs=ends)
        by_token = torch.empty_like(down)
        by_token[order] = down
        return torch.einsum("tkd,tk->td", by_token.unflatten(0, (-1, top_k)), weights.to(down.dtype))

    return run


class Attention:
    """``scaled_dot_product_attention`` over keys and values that lie together, not paged."""

    name = "scaled_dot_product_attention"

    def __init__(self, key: Tensor, value: Tensor, queries: int) -> None:
        self.key, self.value = (each.transpose(0, 1)[None].contiguous() for each in (key, value))
        self.causal = queries > 1

    def schedule(self) -> None:
        """There is nothing to schedule."""

    def __call__(self, query: Tensor, out: Tensor) -> Tensor:
        q = query.transpose(0, 1)[None]
        found = functional.scaled_dot_product_attention(q, self.key, self.value, is_causal=self.causal, enable_gqa=True)
        return found[0].transpose(0, 1)


class TorchPeers(Library):
    """PyTorch on a GPU; ``compile`` is what makes a function of elementwise operators one kernel."""

    name, version = "torch", torch.__version__
    compiled_by_triton = False

    def __init__(self, compile: Compile = torch.compile) -> None:
        self._compile = compile

    def _compiled(self, name: str, function: Callable[..., Any]) -> tuple[str, Callable[..., Any]]:
        return f"{name} (Inductor)", self._compile(function)

    def experts(self, w13: Tensor, w2: Tensor) -> tuple[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]:
        return "grouped_mm", grouped_experts(w13, w2)

    def attention(self, key: Tensor, value: Tensor, queries: int, heads: int) -> Attention | None:
        # Its causal mask is that of queries that are as many as the keys.
        return Attention(key, value, queries) if queries in (1, len(key)) else None

    def linear(self, weight: Tensor) -> tuple[str, Callable[[Tensor], Tensor]]:
        return "F.linear", lambda x: functional.linear(x, weight)

    def rms_norm(self, weight: Tensor, eps: float) -> tuple[str, Callable[..., Any]]:
        def run(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            added = x + residual
            return normalised(added, 1 + weight.float(), eps).to(x.dtype), added

        return self._compiled("rms_norm", run)

    def gated_rms_norm(self, weight: Tensor, eps: float) -> tuple[str, Callable[..., Any]]:
        def run(x: Tensor, z: Tensor) -> Tensor:
            return (normalised(x, weight.float(), eps) * functional.silu(z.float())).to(x.dtype)

        return self._compiled("gated rms_norm", run)

    def silu_and_mul(self) -> tuple[str, Callable[..., Any]]:
        def run(x: Tensor) -> Tensor:
            gate, up = x.float().chunk(2, dim=-1)
            return (functional.silu(gate) * up).to(x.dtype)

        return self._compiled("silu and mul", run)

    def sigmoid_gate(self) -> tuple[str, Callable[..., Any]]:
        return self._compiled("sigmoid gate", lambda x, gate: (x.float() * torch.sigmoid(gate.float())).to(x.dtype))

    def topk_softmax(self, top_k: int) -> tuple[str, Callable[..., Any]]:
        def run(logits: Tensor) -> tuple[Tensor, Tensor]:
            # Softmax of the largest alone is softmax of all, divided by their sum.
            best = logits.float().topk(top_k, dim=1)
            return best.values.softmax(dim=1), best.indices

        return self._compiled("topk", run)

    def qk_norm_rope_gate(
        self, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int, rotary_dim: int, positions: int, eps: float
    ) -> tuple[str, Callable[..., Any]]:
        dim = len(q_weight)
        table = rope_table(positions, rotary_dim)

        def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
            first, second = turned.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

        def run(qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            q_gate, k, v = qkv.split([2 * heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
            q, gate = q_gate.unflatten(1, (heads, 2 * dim)).chunk(2, dim=-1)
            cos, sin = table[positions][:, None].float().chunk(2, dim=-1)
            q, k = (
                rotated(normalised(x, 1 + weight.float(), eps), cos, sin).to(qkv.dtype).flatten(1)
                for x, weight in ((q, q_weight), (k.unflatten(1, (kv_heads, dim)), k_weight))
            )
            return q, k, v, gate.flatten(1)

        return self._compiled("qk norm, rope, gate", run)


def normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last dimension, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def peers(device: str) -> Library | str:
    """PyTorch's for a device type."""
    return TorchPeers()
