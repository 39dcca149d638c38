"""The table of measured backends: what it says, what it refuses, and how the dispatcher follows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qnext_kernels import backend_table, dispatch, force_backend
from qnext_kernels.backend_table import COLUMNS, Measured, Table, TableError, read
from qnext_kernels.dispatch import BACKEND_NAMES, OPERATION_NAMES, Backend, BackendError, Call, Operation, deterministic

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
KEY = ("moe", "experts", torch.bfloat16, (512, 2048, 512, 10))
HEADER = ",".join(COLUMNS)
LINE = "NVIDIA H100 80GB HBM3,moe,experts,bfloat16,512x2048x512x10,8,triton,0.5"


def line(tokens: int, backend: str, device: str = "sm_90") -> Measured:
    return Measured(device, KEY, tokens, backend, 0.5)


def write(folder: Path, *lines: str) -> Path:
    path = folder / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_table_that_is_shipped_can_be_read() -> None:
    assert isinstance(dispatch.measured_backends(), Table)


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    lines = [line(8, "triton"), line(64, "flashinfer"), line(8, "flashinfer", "NVIDIA H200, 141 GB")]
    rows = [",".join(f'"{cell}"' for cell in each.cells()) for each in lines]
    table = read(write(tmp_path, "# a comment, with a comma", HEADER, "", *rows), OPERATION_NAMES, BACKEND_NAMES)
    assert table.lines == tuple(lines)


BROKEN = [
    ("", "expected the columns device,.*, got an empty file"),
    ("device,operation", ":1: expected the columns device,.*, got device,operation"),
    (f"{HEADER}\n# a comment\n\n{LINE},1", ":4: expected 8 values, got 9"),
    (f"{HEADER}\n{LINE}\n{LINE}", ":3: expected one line a case, got NVIDIA H100 .*,8 again"),
]
WRONG = [
    ("device", " ", "a GPU's name or architecture"),
    ("operation", "mow", "one of .*, moe, .*"),
    ("method", "-", "the name of a method"),
    ("dtype", "bf16", "a dtype of PyTorch"),
    ("dtype", "Tensor", "a dtype of PyTorch"),
    ("shape", "512x-1", "positive numbers joined by x"),
    ("shape", "", "positive numbers joined by x"),
    ("tokens", "0", "a positive number"),
    ("tokens", "8.0", "a positive number"),
    ("backend", "cuda", "one of .*, triton, .*"),
    ("ms", "nan", "a positive number"),
    ("ms", "fast", "a positive number"),
]
for column, value, expected in WRONG:
    cells = [value if name == column else cell for name, cell in zip(COLUMNS, LINE.split(","), strict=True)]
    BROKEN.append((f"{HEADER}\n{','.join(cells)}", f":2: {column}: expected {expected}, got {value!r}$"))


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_a_broken_file_is_an_error_that_names_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TableError, match=message) as raised:
        read(write(tmp_path, text), OPERATION_NAMES, BACKEND_NAMES)
    assert str(raised.value).startswith(str(tmp_path / "table.csv"))


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"absent.csv: No such file"):
        read(tmp_path / "absent.csv", OPERATION_NAMES, BACKEND_NAMES)


def test_the_nearest_number_of_tokens_by_ratio_decides() -> None:
    table = Table([line(512, "flash_qla"), line(8, "triton"), line(32, "flashinfer")])
    expected = {1: "triton", 8: "triton", 15: "triton", 17: "flashinfer", 127: "flashinfer", 129: "flash_qla"}
    expected[1 << 20] = "flash_qla"
    assert {tokens: table.fastest(["sm_90"], KEY, tokens) for tokens in expected} == expected


def test_another_case_or_gpu_has_no_entry() -> None:
    table = Table([line(8, "triton")])
    operation, method, dtype, shape = KEY
    others = [
        ("gated_delta_rule", method, dtype, shape),
        (operation, "silu_and_mul", dtype, shape),
        (operation, method, torch.float16, shape),
        (operation, method, dtype, shape[:3]),
    ]
    assert [table.fastest(["sm_90"], key, 8) for key in others] == [None] * 4
    assert table.fastest(["sm_100"], KEY, 8) is None


def test_a_gpus_own_lines_count_before_those_of_its_architecture() -> None:
    table = Table([line(8, "triton"), line(8, "flashinfer", "NVIDIA H200")])
    assert table.fastest(["NVIDIA H200", "sm_90"], KEY, 8) == "flashinfer"
    assert table.fastest(["NVIDIA H100 80GB HBM3", "sm_90"], KEY, 8) == "triton"


# The dispatcher.


class Ours(Backend):
    name = "triton"
    batch_invariant = True


class Theirs(Backend):
    name = "flashinfer"

    def supports_call(self, device: torch.device, dtype: torch.dtype, call: Call) -> str | None:
        return f"has no {' and no '.join(call.features)}" if call.features else None


@pytest.fixture
def operation(monkeypatch: pytest.MonkeyPatch) -> Operation:
    monkeypatch.setattr(dispatch, "OPERATIONS", {})
    return Operation("moe", [Ours(), Theirs()])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(*lines: Measured) -> None:
        monkeypatch.setattr(dispatch, "measured_backends", lambda: Table(lines))
        monkeypatch.setattr(backend_table, "device_names", lambda index: ("NVIDIA H200", "sm_90"))

    return use


def call(tokens: int, *features: str) -> Call:
    return Call("experts", tokens, KEY[3], (), features)


def test_without_a_line_the_order_of_the_list_serves(operation: Operation, measured: Callable[..., None]) -> None:
    measured()
    assert operation.select(GPU, torch.bfloat16, call(8)).name == "triton"
    assert operation.select(GPU, torch.bfloat16).name == "triton"


def test_a_call_is_served_by_the_backend_that_its_line_names(
    operation: Operation, measured: Callable[..., None]
) -> None:
    measured(line(8, "triton"), line(512, "flashinfer"))
    assert operation.select(GPU, torch.bfloat16, call(8)).name == "triton"
    assert operation.select(GPU, torch.bfloat16, call(400)).name == "flashinfer"
    assert operation.select(GPU, torch.float16, call(400)).name == "triton"
    assert operation.select(CPU, torch.bfloat16, call(400)).name == "triton"
    assert operation.select(GPU, torch.bfloat16).name == "triton"


def test_the_backend_of_a_line_may_decline_the_call(operation: Operation, measured: Callable[..., None]) -> None:
    measured(line(8, "flashinfer"))
    assert operation.select(GPU, torch.bfloat16, call(8)).name == "flashinfer"
    assert operation.select(GPU, torch.bfloat16, call(8, "snapshots")).name == "triton"


def test_a_line_for_a_backend_that_the_operation_lacks_changes_nothing(
    operation: Operation, measured: Callable[..., None]
) -> None:
    measured(line(8, "flash_qla"))
    assert operation.select(GPU, torch.bfloat16, call(8)).name == "triton"


def test_a_forced_backend_and_the_deterministic_mode_count_more_than_the_table(
    operation: Operation, measured: Callable[..., None]
) -> None:
    measured(line(8, "flashinfer"))
    with force_backend("triton"):
        assert operation.select(GPU, torch.bfloat16, call(8)).name == "triton"
    with deterministic():
        assert operation.select(GPU, torch.bfloat16, call(8)).name == "triton"


def test_a_forced_backend_that_declines_the_call_is_an_error_with_its_reason(operation: Operation) -> None:
    with force_backend("flashinfer"), pytest.raises(BackendError) as raised:
        operation.select(GPU, torch.bfloat16, call(8, "snapshots", "steps"))
    assert str(raised.value) == (
        "no backend serves moe.experts on cuda:0 with torch.bfloat16; flashinfer: has no snapshots and no steps"
    )
