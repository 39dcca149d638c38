from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from qnext_kernels import (
    experts,
    force_backend,
    gated_rms_norm,
    qk_norm_rope_gate,
    rms_norm,
    sigmoid_gate,
    silu_and_mul,
    topk_softmax,
)
from tests.kernels.kernel_inputs import assert_close

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
HIDDEN = HEADS * HEAD_DIM
EXPERTS, TOP_K, INTERMEDIATE = 6, 2, 24
EPS = 1e-6


def layer(x: Tensor, residual: Tensor, positions: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Every compilable operation in one graph."""
    x, total = rms_norm(x, weights["norm"], EPS, residual)
    qkv = x @ weights["qkv"]
    norms = (weights["q_norm"], weights["k_norm"])
    q, k, v, gate = qk_norm_rope_gate(qkv, positions, *norms, weights["cos_sin"], HEADS, KV_HEADS, EPS)
    gated = sigmoid_gate(gated_rms_norm(q, total, weights["gated_norm"], EPS), gate)
    routed = experts(gated, weights["w13"], weights["w2"], *topk_softmax(gated @ weights["router"], TOP_K, True))
    return total, q, k, v, gate, routed, silu_and_mul(routed)


def layer_weights() -> dict[str, Tensor]:
    """Random weights of :func:`layer`."""
    angles = torch.arange(64)[:, None] * 0.1 ** torch.arange(4)
    return {
        "norm": torch.randn(HIDDEN),
        "qkv": torch.randn(HIDDEN, 2 * (HEADS + KV_HEADS) * HEAD_DIM) * HIDDEN**-0.5,
        "q_norm": torch.randn(HEAD_DIM),
        "k_norm": torch.randn(HEAD_DIM),
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=1),
        "gated_norm": torch.randn(HIDDEN),
        "router": torch.randn(HIDDEN, EXPERTS) * HIDDEN**-0.5,
        "w13": torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) * HIDDEN**-0.5,
        "w2": torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) * INTERMEDIATE**-0.5,
    }


def expect_one_graph(backends: str, compiler: str) -> None:
    """Compile :func:`layer` for any number of tokens, and compare with eager mode, on forced backends."""
    weights = layer_weights()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (3, 17, 40):
        x, residual, positions = torch.randn(tokens, HIDDEN), torch.randn(tokens, HIDDEN), torch.randint(64, (tokens,))
        for tensor in (x, residual, positions):
            torch._dynamo.mark_dynamic(tensor, 0)
        with force_backend(backends):
            expected = layer(x, residual, positions, weights)
            actual = compiled(x, residual, positions, weights)
        for ours, eager in zip(actual, expected, strict=True):
            # The chain's longest reductions one behind the other, on both sides.
            assert_close(ours, eager, {torch.float32: 2 * (3 * HIDDEN + HEAD_DIM + INTERMEDIATE)})
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "cpu"])
def test_operations_compile_to_one_graph_for_every_number_of_tokens_and_agree_with_eager(backend: str) -> None:
    expect_one_graph(backend, "inductor")
