#!/usr/bin/env python3
"""How exact our kernels are on this CPU beside vLLM's own: both against the definition in float64, on the same inputs.

    python benchmarks/cpu_accuracy.py

Layers of Qwen3-Next-80B-A3B in bfloat16. A figure is the norm of the error over that of the result; "rounding alone" is
the true result rounded to the dtype of the result: no kernel can be better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import qnext_kernels
from qnext_kernels import force_backend
from qnext_plugins.cli.bench.cases import OurAttention, balanced_routing
from qnext_plugins.cli.bench.inputs import REAL, int32, normal
from qnext_plugins.cli.bench.roofs import describe_machine
from qnext_vllm.bench import cpu_peers as peers

SIZES = replace(REAL, experts=64)
HEADS = (SIZES.key_heads, SIZES.value_heads, SIZES.linear_dim)


@dataclass
class Outcome:
    """A result of an operation three times."""

    what: str
    truth: Tensor
    ours: Tensor
    peer: Tensor

    def error(self, found: Tensor) -> float:
        return float((found.double() - self.truth).norm() / self.truth.norm())


def exact(function: Callable[..., Tensor], *arguments: Tensor | float | bool) -> Tensor:
    """The definition in float64; bfloat16 arguments are converted."""

    def wide(x: Tensor | float | bool) -> Tensor | float | bool:
        return x.double() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x

    with force_backend("reference"):
        return function(*map(wide, arguments))


def linears() -> Iterator[Outcome]:
    x, weight = normal(8, SIZES.hidden), normal(4096, SIZES.hidden, scale=0.02)
    ours = qnext_kernels.linear(x, weight)
    yield Outcome("linear, 8 tokens", exact(qnext_kernels.linear, x, weight), ours, peers.linear(weight)[1](x))


def experts() -> Iterator[Outcome]:
    w13 = normal(SIZES.experts, 2 * SIZES.intermediate, SIZES.hidden, scale=0.02)
    w2 = normal(SIZES.experts, SIZES.hidden, SIZES.intermediate, scale=0.02)
    x, ids = normal(32, SIZES.hidden), balanced_routing(32, SIZES.experts, SIZES.top_k)
    weights, out = torch.softmax(torch.randn(32, SIZES.top_k), dim=-1), torch.empty_like(x)
    peers.experts(w13, w2)[1](out, x, weights, ids)
    arguments = (x, w13, w2, weights, ids)
    yield Outcome(
        "experts, 32 tokens", exact(qnext_kernels.experts, *arguments), qnext_kernels.experts(*arguments), out
    )


def attention() -> Iterator[Outcome]:
    for what, queries, context in (("prefill of 512", 512, 512), ("decode at 8192", 1, 8192)):
        key, value = (normal(context, SIZES.kv_heads, SIZES.head_dim) for _ in range(2))
        query = normal(queries, SIZES.heads, SIZES.head_dim, scale=3.0)
        peer = peers.PagedAttention(key, value, queries, SIZES.heads)(query, torch.empty_like(query))
        with force_backend("reference"):
            truth = OurAttention(key.double(), value.double(), queries)(query.double())
        yield Outcome(f"attention, {what}", truth, OurAttention(key, value, queries)(query), peer)


def delta_rule() -> Iterator[Outcome]:
    tokens, keys = 512, SIZES.key_heads * SIZES.linear_dim
    convolved, a, b = (normal(tokens, size) for size in (SIZES.channels, SIZES.value_heads, SIZES.value_heads))
    A_log, dt_bias = torch.rand(SIZES.value_heads), normal(SIZES.value_heads)
    parts = convolved.split([keys, keys, SIZES.value_heads * SIZES.linear_dim], dim=1)
    inputs = (*(part.unflatten(1, (-1, SIZES.linear_dim)) for part in parts), a, b, A_log, dt_bias)
    slots, starts = int32([1]), int32([0, tokens])

    def pool(dtype: torch.dtype) -> Tensor:
        return torch.zeros(2, SIZES.value_heads, SIZES.linear_dim, SIZES.linear_dim, dtype=dtype)

    states = pool(torch.float64), pool(torch.float32), pool(torch.float32)
    where = (slots, starts, torch.tensor([False]))
    truth = exact(qnext_kernels.gated_delta_rule_prefill, *inputs, states[0], *where)
    ours = qnext_kernels.gated_delta_rule_prefill(*inputs, states[1], *where)
    peer = peers.DeltaRule(HEADS).prefill(convolved, a, b, A_log, dt_bias, states[2], slots, starts)
    yield Outcome(f"delta rule, prefill of {tokens}", truth, ours, peer)
    yield Outcome("delta rule, state behind it", states[0][1], states[1][1], states[2][1].transpose(1, 2))


def convolution() -> Iterator[Outcome]:
    x, weight = normal(512, SIZES.channels), normal(SIZES.channels, SIZES.conv_width, scale=0.5)
    pools = [torch.zeros(2, SIZES.conv_width - 1, SIZES.channels, dtype=torch.bfloat16) for _ in range(2)]
    slots, starts = int32([1]), int32([0, 512])
    where = (slots, starts, torch.tensor([False]))
    truth = exact(qnext_kernels.causal_conv1d_prefill, x, weight, pools[0].transpose(1, 2), *where)
    ours = qnext_kernels.causal_conv1d_prefill(x, weight, pools[0].transpose(1, 2), *where)
    peer = peers.DeltaNetLayer(weight, pools[1], HEADS).convolve(x, slots, starts, False)
    yield Outcome("convolution, prefill of 512", truth, ours, peer)


def main() -> None:
    torch.manual_seed(0)
    console, table = Console(), Table("result", "ours", "vLLM's own", "rounding alone")
    with torch.inference_mode():
        for operation in (linears, experts, attention, delta_rule, convolution):
            for one in operation():
                rounded = one.truth.to(one.ours.dtype)
                table.add_row(one.what, *(f"{one.error(x):.3e}" for x in (one.ours, one.peer, rounded)))
    for line in describe_machine():
        console.print(line, markup=False, highlight=False)
    console.print(table)


if __name__ == "__main__":
    main()
