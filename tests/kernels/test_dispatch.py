from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from qnext_kernels import (
    OPERATIONS,
    dispatch,
    experts,
    explain,
    force_backend,
    gated_rms_norm,
    rms_norm,
    selected_backends,
    sigmoid_gate,
    silu_and_mul,
    topk_softmax,
    without_kernels,
)
from qnext_kernels.dispatch import Backend, BackendError, Operation, parse_forced

CPU = torch.device("cpu")
NAMES = {
    "causal_conv1d",
    "gated_attention",
    "gated_delta_rule",
    "gated_norm",
    "linear",
    "moe",
    "paged_attention",
    "rms_norm",
}


class FirstBackend(Backend):
    name = "triton"
    devices = ("cuda",)


class SecondBackend(Backend):
    name = "cpu"

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return super().supports(device, dtype) or ("is too coarse" if dtype == torch.float16 else None)


@pytest.fixture
def two_backends(monkeypatch: pytest.MonkeyPatch) -> Operation:
    monkeypatch.setattr(dispatch, "OPERATIONS", {})
    return Operation("moe", [FirstBackend(), SecondBackend()])


def selected(operation: str) -> str:
    return OPERATIONS[operation].select(CPU, torch.float32).name


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", {}),
        ("reference", {"*": "reference"}),
        ("cpu,gated_delta_rule=reference", {"*": "cpu", "gated_delta_rule": "reference"}),
        (" moe = cpu , , reference ", {"moe": "cpu", "*": "reference"}),
    ],
)
def test_forced_backends_are_parsed(value: str, expected: dict[str, str]) -> None:
    assert parse_forced(value) == expected


@pytest.mark.parametrize("value", ["cuda", "moe=cuda", "moe=", "reference,cuda", "cpu=moe"])
def test_an_unknown_backend_is_refused_with_the_known_ones(value: str) -> None:
    names = "reference, cpu, native, triton, triton_context_parallel, flashinfer, flash_qla"
    with pytest.raises(BackendError, match=rf"^QNEXT_BACKEND: expected one of {names}, got"):
        parse_forced(value)


def test_an_unknown_operation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BackendError, match=r"^QNEXT_BACKEND: expected an operation .*, got 'gated_delta'$"):
        parse_forced("gated_delta=reference")


def test_every_operation_is_registered_and_prefers_its_cpu_backend() -> None:
    assert set(OPERATIONS) == NAMES
    with force_backend("reference"):
        assert {selected(name) for name in NAMES} == {"reference"}
    for name in NAMES:
        with force_backend("reference"), force_backend(f"{name}=cpu"):
            assert {other for other in NAMES if selected(other) == "cpu"} == {name}


def test_a_forced_backend_ends_with_its_block_even_after_an_error() -> None:
    before = {name: selected(name) for name in NAMES}
    with pytest.raises(ZeroDivisionError), force_backend("reference"):
        raise ZeroDivisionError
    assert {name: selected(name) for name in NAMES} == before


def test_the_environment_forces_backends() -> None:
    script = (
        "import torch, qnext_kernels as k\n"
        "print(*(k.OPERATIONS[n].select(torch.device('cpu'), torch.float32).name for n in ('rms_norm', 'moe')))"
    )
    environment = os.environ | {"QNEXT_BACKEND": "reference,moe=cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["reference", "cpu"]


@pytest.mark.parametrize("operation", sorted(NAMES - {"gated_delta_rule"}))
def test_a_forced_backend_that_an_operation_lacks_is_an_error_that_names_both(operation: str) -> None:
    with force_backend("flash_qla"), pytest.raises(BackendError, match=f"^{operation} has no backend 'flash_qla'"):
        selected(operation)


def test_a_public_function_raises_the_error_of_a_forced_backend() -> None:
    x, ids = torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.int32)
    calls = [
        lambda: rms_norm(x, x[0], 1e-6),
        lambda: gated_rms_norm(x, x, x[0], 1e-6),
        lambda: sigmoid_gate(x, x),
        lambda: silu_and_mul(x),
        lambda: topk_softmax(x, 1, renormalize=True),
        lambda: experts(x, torch.ones(1, 2, 4), torch.ones(1, 4, 1), torch.ones(2, 1), ids),
    ]
    for call in calls:
        with force_backend("flashinfer"), pytest.raises(BackendError, match="flashinfer"):
            call()


def test_a_backend_that_declines_is_skipped(two_backends: Operation) -> None:
    assert two_backends.select(CPU, torch.float32).name == "cpu"
    assert two_backends.select(torch.device("cuda"), torch.float32).name == "triton"


def test_the_final_error_carries_every_reason(two_backends: Operation) -> None:
    with pytest.raises(BackendError) as raised:
        two_backends.select(CPU, torch.float16)
    assert str(raised.value) == (
        "no backend serves moe on cpu with torch.float16; triton: runs on cuda, not on cpu; cpu: is too coarse"
    )


def test_a_forced_backend_that_declines_is_an_error_with_its_reason_alone(two_backends: Operation) -> None:
    with force_backend("triton"), pytest.raises(BackendError, match=r"moe .*; triton: runs on cuda, not on cpu$"):
        two_backends.select(CPU, torch.float32)


def test_operations_that_only_the_reference_serves_on_a_device_are_named(two_backends: Operation) -> None:
    Operation("linear", [SecondBackend()])
    assert without_kernels("cuda") == ["linear"]
    assert without_kernels("tpu") == ["moe", "linear"]


def test_operations_that_are_left_out_are_not_asked() -> None:
    with force_backend("linear=triton"):
        with pytest.raises(BackendError, match="linear"):
            selected_backends(CPU, torch.float32)
        assert set(selected_backends(CPU, torch.float32, but=["linear"])) == NAMES - {"linear"}


def test_explain_gives_every_backend_its_reason_fastest_first() -> None:
    assert set(explain(CPU, torch.float32)) == NAMES
    for reasons in explain(CPU, torch.float32).values():
        assert reasons["cpu"] is None
        assert list(reasons)[-1] == "reference"
    for reasons in explain(torch.device("cuda"), torch.float32).values():
        assert reasons["cpu"] == "runs on cpu, not on cuda"
        assert reasons["reference"] is None
    for reasons in explain(CPU, torch.int32).values():
        assert set(reasons.values()) == {"needs a floating-point dtype, got torch.int32"}
