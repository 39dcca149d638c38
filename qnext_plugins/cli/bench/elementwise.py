"""Rows of norms, gates and the router, which vLLM leaves to Inductor.

Each runs alone here, through one call of a compiled function or of ours; in the model that call is shared with what is
around it. The rows of few tokens are therefore mostly the overhead of a call, on all sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import qnext_kernels
from qnext_kernels.dispatch import OPERATIONS
from qnext_plugins.cli.bench.inputs import BF16, EPS, ROPE_THETA, Case, Library, Row, Side, Sizes, normal, sides_of
from qnext_plugins.cli.bench.roofs import rotations

Function = Callable[..., Any]
QUICK = ("rms norm + residual", "gated rms norm", "qk norm + rope + gate", "router top-k")


def elementwise_rows(s: Sizes, libraries: Sequence[Library]) -> Iterator[Row]:
    q_heads, qkv_width = s.heads * s.head_dim, 2 * (s.heads + s.kv_heads) * s.head_dim
    norm, gated, q_norm, k_norm = (normal(n) for n in (s.hidden, s.linear_dim, s.head_dim, s.head_dim))
    cos_sin = rope_table(max(s.rows), s.rotary_dim)

    def rows(
        op: str,
        operation: str,
        ours: Function,
        method: str,
        settings: tuple[Any, ...],
        make: Callable[[int], tuple],
        moved: int,
        comparable: Callable[[Any], Any] = lambda result: result,
    ) -> list[Row]:
        # Once for all rows: what a side compiles, it compiles for any number of tokens.
        made = cache(lambda library: getattr(library, method)(*settings))
        compiled = cache(libraries[0].compiled if libraries else lambda function: function)

        def build(tokens: int) -> Case:
            # Small inputs come from the operation before, out of a cache.
            sets = min(rotations(moved * tokens), 512) if tokens == max(s.rows) else 1
            inputs = [make(tokens) for _ in range(sets)]
            for tensor in sum(inputs, ()):
                if len(tensor) > 1:  # one row is compiled apart
                    torch._dynamo.mark_dynamic(tensor, 0)  # as vLLM does: compiled once for any number of tokens

            def run(i: int) -> Any:
                # PyTorch's operators, which the engine's torch.compile sees through, are compiled; C++ it calls.
                backend = OPERATIONS[operation].select(norm.device, BF16)
                traced = getattr(type(backend), method).__module__.endswith(".cpu")
                return (compiled(ours) if traced else ours)(*inputs[i % sets])

            def side(library: Library) -> Side | None:
                if (found := made(library)) is None:
                    return None
                name, function = found
                return Side(name, lambda i: function(*inputs[(i + sets // 2 if i else 0) % sets]))

            return Case(
                run,
                sides_of(libraries, side),
                flops=0,
                moved=moved * tokens if tokens == max(s.rows) else None,
                sets=sets,
                comparable=comparable,
                compiled=True,
            )

        # FlashInfer's experts and heads leave what is around them to Triton.
        borrowed = ("flashinfer",) if operation == "moe" or op == "sigmoid gate" else ()
        row = partial(Row, op, operation=operation, quick=op in QUICK, borrowed=borrowed)
        return [row(f"T={tokens}", partial(build, tokens), stepped=tokens < max(s.rows)) for tokens in s.rows]

    def two(width: int) -> Callable[[int], tuple]:
        return lambda tokens: (normal(tokens, width), normal(tokens, width))

    yield from rows(
        "rms norm + residual",
        "rms_norm",
        lambda x, residual: qnext_kernels.rms_norm(x, norm, EPS, residual),
        "rms_norm",
        (norm, EPS),
        two(s.hidden),
        8 * s.hidden,
    )
    heads = s.value_heads
    yield from rows(
        "gated rms norm",
        "gated_norm",
        lambda x, z: qnext_kernels.gated_rms_norm(x, z, gated, EPS),
        "gated_rms_norm",
        (gated, EPS),
        lambda tokens: two(s.linear_dim)(tokens * heads),
        6 * heads * s.linear_dim,
    )
    yield from rows(
        "qk norm + rope + gate",
        "gated_attention",
        lambda x, at: qnext_kernels.qk_norm_rope_gate(x, at, q_norm, k_norm, cos_sin, s.heads, s.kv_heads, EPS),
        "qk_norm_rope_gate",
        (q_norm, k_norm, s.heads, s.kv_heads, s.rotary_dim, max(s.rows), EPS),
        lambda tokens: (normal(tokens, qkv_width), torch.arange(tokens)),
        4 * qkv_width,
    )
    yield from rows(
        "router top-k",
        "moe",
        lambda logits: qnext_kernels.topk_softmax(logits, s.top_k, True),
        "topk_softmax",
        (s.top_k,),
        lambda tokens: (distinct_logits(tokens, s.experts),),
        2 * s.experts,
        lambda result: by_expert(result[0], result[1], s.experts),
    )
    yield from rows(
        "sigmoid gate",
        "gated_attention",
        lambda x, gate: qnext_kernels.sigmoid_gate(x, gate),
        "sigmoid_gate",
        (),
        two(q_heads),
        6 * q_heads,
    )
    yield from rows(
        "silu and mul",
        "moe",
        lambda x: qnext_kernels.silu_and_mul(x),
        "silu_and_mul",
        (),
        lambda tokens: (normal(tokens, 2 * s.intermediate),),
        6 * s.intermediate,
    )


def rope_table(positions: int, rotary_dim: int) -> Tensor:
    """[positions, rotary_dim] in bfloat16: cosines, then sines, of base :data:`ROPE_THETA`."""
    frequencies = ROPE_THETA ** -(torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    angles = torch.outer(torch.arange(positions).float(), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(BF16)


def distinct_logits(tokens: int, experts: int) -> Tensor:
    """[tokens, experts] in bfloat16, −4 to 4, without ties, which two routers may break differently."""
    order = torch.rand(tokens, experts).argsort(dim=1)
    return ((order - experts // 2) / (experts // 8)).to(BF16)


def by_expert(weights: Tensor, ids: Tensor, experts: int) -> Tensor:
    """[tokens, experts]: the weight of each expert, so that the order of the chosen does not matter."""
    return weights.new_zeros(len(ids), experts).scatter_(1, ids.long(), weights)
