"""The native kernels as operators of torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import EagerAndRecordGraphs

from qnext_kernels import force_backend, rms_norm, sigmoid_gate
from qnext_kernels.operators import operator
from tests.kernels.kernel_inputs import DTYPES, same_bits

HEADS, KV_HEADS, HEAD_DIM, EPS = 4, 2, 20, 1e-6


def arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """For every operator, arguments that are views where the model passes views."""
    rows, heads = torch.randn(2, 5, 70, dtype=dtype)[:, :, 3:36], torch.randn(2, 5, 8, 40, dtype=dtype)[..., :16]
    qkv = torch.randn(5, 2 * (HEADS + KV_HEADS) * HEAD_DIM + 3, dtype=dtype)[:, :-3]
    weight = torch.randn(64, dtype=dtype)
    rotary = (torch.arange(5), weight[:HEAD_DIM], weight[:HEAD_DIM], torch.randn(9, 8))
    return {
        "rms_norm": (rows[0], weight[:33], EPS),
        "add_rms_norm": (rows[0], rows[1], weight[:33], EPS),
        "gated_rms_norm": (heads[0], heads[1], weight[:16], EPS, torch.empty(heads[0].shape, dtype=dtype)),
        "qk_norm_rope_gate": (qkv, *rotary, HEADS, KV_HEADS, EPS),
        "sigmoid_gate": (rows[0], rows[1][:, :1]),
        "topk_softmax": (rows[0], 3, True),
        "silu_and_mul": (heads[0],),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", arguments(torch.float32))
def test_the_operator_is_what_its_schema_and_its_fake_say(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(torch.ops.qnext, name).default, arguments(dtype)[name])


@pytest.mark.parametrize(("backend", "expected"), [("native", ["add_rms_norm", "sigmoid_gate"]), ("cpu", [])])
def test_a_graph_holds_the_operators_of_native_backends_alone(backend: str, expected: list[str]) -> None:
    def both(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return *rms_norm(x, weight, EPS, x), sigmoid_gate(x, x)

    graphs, x, weight = EagerAndRecordGraphs(), torch.randn(5, 33), torch.randn(33)
    with force_backend(backend):
        results = torch.compile(both, fullgraph=True, backend=graphs)(x, weight)
        assert all(same_bits(ours, eager) for ours, eager in zip(results, both(x, weight), strict=True))
    (graph,) = graphs.graphs
    targets = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert [target._schema.name for target in targets] == [f"qnext::{name}" for name in expected]


def test_a_position_outside_of_the_table_is_refused_in_a_graph_too() -> None:
    given = arguments(torch.float32)["qk_norm_rope_gate"]
    for positions in (given[1] + 5, given[1] - 1):
        with pytest.raises(IndexError, match=r"^positions: expected indices within \[0, 9\)"):
            torch.ops.qnext.qk_norm_rope_gate(given[0], positions, *given[2:])


def test_what_an_operator_writes_in_place_is_in_its_schema() -> None:
    @operator(lambda x, value: None, mutates=["x"])
    def fill_in_place(x: Tensor, value: float) -> None:
        x.fill_(value)

    graphs, x = EagerAndRecordGraphs(), torch.zeros(3)
    torch.compile(lambda x: fill_in_place(x, 2.0), fullgraph=True, backend=graphs)(x)
    assert torch.equal(x, torch.full((3,), 2.0))
    assert torch.ops.qnext.fill_in_place.default._schema.is_mutable
    torch.library.opcheck(torch.ops.qnext.fill_in_place.default, (x, 1.0))
