"""Rows of ``cpu_ops.py``: norms, gates and the router, which vLLM leaves to Inductor.

Each runs alone here, through one call of a compiled function or of ours; in the model that call is shared with what is
around it. The rows of few tokens are therefore mostly the overhead of a call, on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import cpu_peers as peers
import torch
from cpu_inputs import BF16, EPS, Case, Row, Sizes, normal
from cpu_roof import rotations
from torch import Tensor

import qnext_kernels
from qnext_kernels.dispatch import OPERATIONS

Sides = tuple[Callable[..., Any], Callable[..., Any]]
"""Ours and the peer's."""
QUICK = ("rms norm + residual", "gated rms norm", "qk norm + rope + gate", "router top-k")


def elementwise_rows(s: Sizes) -> Iterator[Row]:
    q_heads, qkv_width = s.heads * s.head_dim, 2 * (s.heads + s.kv_heads) * s.head_dim
    norm, gated, q_norm, k_norm = (normal(n) for n in (s.hidden, s.linear_dim, s.head_dim, s.head_dim))

    def rms_norm() -> Sides:
        return (lambda x, r: qnext_kernels.rms_norm(x, norm, EPS, r)), peers.rms_norm(norm, EPS)

    def gated_rms_norm() -> Sides:
        return (lambda x, z: qnext_kernels.gated_rms_norm(x, z, gated, EPS)), peers.gated_rms_norm(gated, EPS)

    def qk_norm_rope_gate() -> Sides:
        rest = (s.heads, s.kv_heads)
        cos_sin, peer = peers.qk_norm_rope_gate(q_norm, k_norm, *rest, s.rotary_dim, max(s.rows), EPS)
        return (lambda x, at: qnext_kernels.qk_norm_rope_gate(x, at, q_norm, k_norm, cos_sin, *rest, EPS)), peer

    def topk_softmax() -> Sides:
        return (lambda logits: qnext_kernels.topk_softmax(logits, s.top_k, True)), peers.topk_softmax(s.top_k)

    def sigmoid_gate() -> Sides:
        return (lambda x, gate: qnext_kernels.sigmoid_gate(x, gate)), peers.sigmoid_gate()

    def silu_and_mul() -> Sides:
        return (lambda x: qnext_kernels.silu_and_mul(x)), peers.silu_and_mul()

    def both(
        op: str,
        peer_name: str,
        folder: str,
        sides: Callable[[], Sides],
        make: Callable[[int], tuple],
        moved: int,
        **more: Any,
    ) -> list[Row]:
        sides_once = cache(sides)
        method = sides.__name__

        def build(tokens: int) -> Case:
            ours, peer = sides_once()
            # PyTorch's operators, which the engine's torch.compile sees through, are compiled; C++ it calls.
            backend = OPERATIONS[folder].select(torch.device("cpu"), BF16)
            if getattr(type(backend), method).__module__.endswith(".cpu"):
                ours = ours_compiled(ours)
            # Small inputs come from the operation before, out of a cache.
            sets = rotations(moved * tokens) if tokens == max(s.rows) else 1
            inputs = [make(tokens) for _ in range(sets)]
            for tensor in sum(inputs, ()):
                torch._dynamo.mark_dynamic(tensor, 0)  # as vLLM does: compiled once for any number of tokens
            return Case(
                f"{peer_name} (Inductor)",
                ours=lambda i: ours(*inputs[i % sets]),
                peer=lambda i: peer(*inputs[(i + sets // 2 if i else 0) % sets]),
                flops=0,
                moved=moved * tokens if sets > 1 else None,
                compiled=True,
                **more,
            )

        ours_compiled = cache(peers.compiled)
        return [Row(op, f"T={tokens}", partial(build, tokens), quick=op in QUICK) for tokens in s.rows]

    def two(width: int) -> Callable[[int], tuple]:
        return lambda tokens: (normal(tokens, width), normal(tokens, width))

    yield from both("rms norm + residual", "GemmaRMSNorm", "rms_norm", rms_norm, two(s.hidden), 8 * s.hidden)
    heads = s.value_heads
    yield from both(
        "gated rms norm",
        "RMSNormGated",
        "gated_norm",
        gated_rms_norm,
        lambda tokens: two(s.linear_dim)(tokens * heads),
        6 * heads * s.linear_dim,
    )
    yield from both(
        "qk norm + rope + gate",
        "Qwen3NextAttention",
        "gated_attention",
        qk_norm_rope_gate,
        lambda tokens: (normal(tokens, qkv_width), torch.arange(tokens)),
        4 * qkv_width,
    )
    yield from both(
        "router top-k",
        "CPURouter",
        "moe",
        topk_softmax,
        lambda tokens: (distinct_logits(tokens, s.experts),),
        2 * s.experts,
        comparable=lambda result: by_expert(*result, s.experts),
    )
    yield from both("sigmoid gate", "torch.sigmoid", "gated_attention", sigmoid_gate, two(q_heads), 6 * q_heads)
    yield from both(
        "silu and mul",
        "SiluAndMul",
        "moe",
        silu_and_mul,
        lambda tokens: (normal(tokens, 2 * s.intermediate),),
        6 * s.intermediate,
    )


def distinct_logits(tokens: int, experts: int) -> Tensor:
    """[tokens, experts] in bfloat16, −4 to 4, without ties, which two routers may break differently."""
    order = torch.rand(tokens, experts).argsort(dim=1)
    return ((order - experts // 2) / (experts // 8)).to(BF16)


def by_expert(weights: Tensor, ids: Tensor, experts: int) -> Tensor:
    """[tokens, experts]: the weight of each expert, so that the order of the chosen does not matter."""
    return weights.new_zeros(len(ids), experts).scatter_(1, ids.long(), weights)
