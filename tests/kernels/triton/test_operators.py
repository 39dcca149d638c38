"""The Triton kernels as operators of torch.compile, interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import EagerAndRecordGraphs

from qnext_kernels import rms_norm, sigmoid_gate
from tests.kernels.kernel_inputs import same_bits
from tests.kernels.test_operators import EPS, arguments

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.mark.parametrize("name", arguments(torch.float32))
def test_the_operator_is_what_its_schema_and_its_fake_say(name: str) -> None:
    given: tuple[Any, ...] = arguments(torch.bfloat16)[name]
    torch.library.opcheck(getattr(torch.ops.qnext, f"triton_{name}").default, given)


def test_a_graph_holds_the_operators() -> None:
    def both(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return *rms_norm(x, weight, EPS, x), sigmoid_gate(x, x)

    graphs, x, weight = EagerAndRecordGraphs(), torch.randn(5, 33), torch.randn(33)
    results = torch.compile(both, fullgraph=True, backend=graphs)(x, weight)
    assert all(same_bits(ours, eager) for ours, eager in zip(results, both(x, weight), strict=True))
    (graph,) = graphs.graphs
    targets = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert [target._schema.name for target in targets] == ["qnext::triton_add_rms_norm", "qnext::triton_sigmoid_gate"]
