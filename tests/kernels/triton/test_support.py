"""When Triton serves, and the reasons it gives where it does not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import triton

from qnext_kernels import OPERATIONS, triton_support
from qnext_kernels.gated_delta_rule.triton import TritonGatedDeltaRule
from qnext_kernels.triton_support import Target, aligned_rows, power_of_two

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
OPERATION = OPERATIONS["gated_delta_rule"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    triton_support._unsuitable.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    yield
    triton_support._unsuitable.cache_clear()


def test_a_cpu_is_declined_unless_triton_interprets() -> None:
    backend = TritonGatedDeltaRule()
    assert backend.supports(CPU, torch.bfloat16) == "runs on cuda, not on cpu"
    before = OPERATION.select(CPU, torch.bfloat16)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        assert backend.supports(CPU, torch.bfloat16) is None
        assert OPERATION.select(CPU, torch.bfloat16) is before


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_is_served_before_the_reference(dtype: torch.dtype) -> None:
    assert isinstance(OPERATION.select(GPU, dtype), TritonGatedDeltaRule)


def test_a_graph_takes_what_is_known_of_the_gpu_for_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    def untraceable(index: int | None) -> None:
        torch._dynamo.graph_break()

    monkeypatch.setattr(triton_support, "_unsuitable", untraceable)

    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if isinstance(OPERATION.select(GPU, torch.bfloat16), TritonGatedDeltaRule) else 0)

    assert chosen(torch.zeros(1)) == 1


@pytest.mark.usefixtures("gpu")
def test_other_dtypes_are_declined() -> None:
    backend = TritonGatedDeltaRule()
    assert backend.supports(GPU, torch.int32) == "needs a floating-point dtype, got torch.int32"
    reason = backend.supports(GPU, torch.float64)
    assert reason == "computes in torch.float32, torch.bfloat16, torch.float16, got torch.float64"
    assert OPERATION.select(GPU, torch.float64).name == "reference"


@pytest.mark.usefixtures("gpu")
def test_an_old_gpu_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert TritonGatedDeltaRule().supports(GPU, torch.float16) == "needs compute capability 8.0, got 7.5"
    triton_support._unsuitable.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert TritonGatedDeltaRule().supports(GPU, torch.float16) is None


def test_without_a_gpu_or_without_triton_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_support._unsuitable.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TritonGatedDeltaRule().supports(GPU, torch.float16) == "PyTorch finds no GPU"
    monkeypatch.setattr(triton_support, "_installed", lambda: False)
    assert TritonGatedDeltaRule().supports(GPU, torch.float16) == "triton is not installed"


def test_asking_is_a_constant_in_a_graph_of_torch_compile() -> None:
    backend = TritonGatedDeltaRule()

    def ask(x: torch.Tensor) -> torch.Tensor:
        return x - 1 if backend.supports(x.device, x.dtype) is None else x + 1

    assert torch.compile(ask, fullgraph=True, backend="eager")(torch.zeros(2)).tolist() == [1, 1]


def test_serving_on_a_cpu_imports_no_kernel() -> None:
    script = (
        "import sys, torch, qnext_kernels as k\n"
        "k.OPERATIONS['gated_delta_rule'].select(torch.device('cpu'), torch.float32)\n"
        "print([name for name in sys.modules if 'gated_delta_rule.triton_' in name])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rows_are_copied_only_where_they_are_strided_or_begin_at_an_odd_address() -> None:
    x = torch.randn(6, 4, 16)
    assert aligned_rows(x) is x
    assert aligned_rows(x[:, 1:]).data_ptr() == x[:, 1:].data_ptr()
    for view in (x[:, :, 1:], x.transpose(1, 2), x.view(-1)[1:-15].view(-1, 2, 8)):
        copy = aligned_rows(view)
        assert torch.equal(copy, view)
        assert copy.data_ptr() != view.data_ptr()
        assert copy.data_ptr() % 16 == 0
        assert copy.stride(-1) == 1


def test_products_of_float32_keep_its_accuracy_on_every_target() -> None:
    nvidia, amd = Target(nvidia=True, shared_memory=1 << 17), Target(nvidia=False, shared_memory=1 << 16)
    assert [nvidia.precision(dtype) for dtype in triton_support.DTYPES] == ["tf32x3", "tf32", "tf32"]
    assert [amd.precision(dtype) for dtype in triton_support.DTYPES] == ["ieee"] * 3


def test_powers_of_two_are_not_below() -> None:
    assert [power_of_two(x) for x in (0, 1, 2, 3, 4, 5, 127, 128, 129)] == [1, 1, 2, 4, 4, 8, 128, 128, 256]
