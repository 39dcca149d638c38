"""The operations of a layer in one graph of torch.compile, as an engine holds them on a GPU."""

from __future__ import annotations

from tests.kernels.test_compile import expect_one_graph
from tests.kernels.triton.interpreter import interpreted, kernel_modules, operations_on_triton


def test_nothing_of_tritons_host_code_is_traced() -> None:
    forced = [f"{name}=triton" for name in operations_on_triton()]
    with interpreted(*kernel_modules()):
        expect_one_graph(",".join(forced), "aot_eager")
