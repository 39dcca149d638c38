"""The native library: compiled once, kept, and where it cannot be had PyTorch serves and says why."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qnext_kernels import native
from qnext_kernels.native import NativeError, build, instruction_set, library
from tests.kernels.kernel_inputs import same_bits

SERVED = """
import torch
from qnext_kernels import explain, selected_backends
print(selected_backends(torch.device("cpu"), torch.bfloat16)["gated_delta_rule"])
print(explain(torch.device("cpu"), torch.bfloat16)["gated_delta_rule"]["native"])
"""


def served(**environment: str) -> tuple[list[str], str]:
    """What serves the delta rule in a fresh process, the reason why the native backend does not, and its log."""
    done = subprocess.run(
        [sys.executable, "-c", SERVED], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines(), done.stderr


def test_library_is_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "csrc"
    source.mkdir()
    (source / "answer.cpp").write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 42; }')
    monkeypatch.setattr(native, "SOURCES", source)
    isa, folder = instruction_set(), tmp_path / "cache"
    first = build(isa, folder)
    assert ctypes.CDLL(str(first)).answer() == 42
    made = first.stat().st_mtime_ns
    assert build(isa, folder) == first
    assert first.stat().st_mtime_ns == made
    (source / "answer.cpp").write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 43; }')
    second = build(isa, folder)
    assert second != first
    assert ctypes.CDLL(str(second)).answer() == 43
    assert {path.suffix for path in folder.iterdir()} == {".so", ".lock"}, "nothing is left of a compilation"


@pytest.mark.parametrize("isa", native.FLAGS_OF_ISA)
def test_kernels_compile_for_every_instruction_set(isa: str, tmp_path: Path) -> None:
    assert build(isa, tmp_path).stat().st_size > 0


def usable_instruction_sets() -> list[str]:
    try:
        return native.usable_instruction_sets()
    except NativeError:
        return []


def other_instruction_sets() -> list[str]:
    """Those of this processor that are not taken by default; where it has AMX, not what stands in for it."""
    usable = usable_instruction_sets()
    return [isa for isa in usable[1:] if isa != "amx-emulated" or "amx" not in usable]


@pytest.mark.slow
@pytest.mark.parametrize("isa", other_instruction_sets())
def test_kernels_of_another_instruction_set_pass_their_tests(isa: str) -> None:
    here = Path(__file__).parent
    names = (
        "linear",
        "linear_fp8",
        "linear_integers",
        "moe",
        "moe_shared",
        "experts_w8a16",
        "experts_int4",
        "gated_norm",
        "rms_norm",
        "gated_attention",
        "paged_attention",
    )
    names += ("causal_conv1d", "causal_conv1d_grouped", "gated_delta_rule", "gated_delta_net")
    files = [str(here / f"test_{name}.py") for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "native or packed", "-p", "no:cacheprovider", *files],
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {"QNEXT_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.skipif("amx" not in usable_instruction_sets(), reason="wants AMX")
def test_amx_has_the_bits_of_what_stands_in_for_it(tmp_path: Path) -> None:
    results = []
    for isa in ("amx", "amx-emulated"):
        command = [sys.executable, "-m", "tests.kernels.tile_results", str(tmp_path / isa)]
        subprocess.run(command, env=os.environ | {"QNEXT_ISA": isa}, cwd=Path(__file__).parents[2], check=True)
        results.append(torch.load(tmp_path / isa))
    assert len(results[0]) == len(results[1]) > 0
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("lacks", [None, "_tiles_permitted", "_compiles"])
def test_amx_is_used_where_system_and_compiler_have_it(lacks: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_cpu_flags", lambda: set().union(*native.CPU_FLAGS_OF_ISA.values()))
    for name in ("_tiles_permitted", "_compiles"):
        monkeypatch.setattr(native, name, lambda *_, answer=name != lacks: answer)
    others = ["avx512bf16", "avx2", "amx-emulated"]
    assert native.usable_instruction_sets() == (others if lacks else ["amx", *others])


def test_compiler_that_does_not_know_an_instruction_set_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    native._compiles.cache_clear()
    assert native._compiles("avx2")
    native._compiles.cache_clear()
    monkeypatch.setenv("CXX", "false")
    assert not native._compiles("avx2")
    native._compiles.cache_clear()


def test_library_shares_the_threads_of_pytorch() -> None:
    library()
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert [path for path in paths if path.endswith("/libgomp.so.1")] == [
        f"{Path(torch.__file__).parent}/lib/libgomp.so.1"
    ]


def test_without_a_compiler_pytorch_serves_with_one_line(tmp_path: Path) -> None:
    lines, log = served(PATH="", CXX="", QNEXT_CACHE_DIR=str(tmp_path))
    assert lines == ["cpu", "needs a C++ compiler once (g++ or clang++, or its name in CXX)"]
    assert log.count("PyTorch's operators serve on this CPU instead of the C++ kernels") == 1


def test_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    lines, log = served(CXX="false", QNEXT_CACHE_DIR=str(tmp_path))
    assert lines[0] == "cpu"
    assert "the C++ compiler failed: false" in log


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lines, log = served(QNEXT_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert lines[0] == "cpu"
    assert str(tmp_path / "file") in log


def test_instruction_set_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QNEXT_ISA", "avx1024")
    with pytest.raises(NativeError, match=r"^QNEXT_ISA: expected one of .*avx2.*, got 'avx1024'"):
        instruction_set()


def test_dtypes_of_others_are_declined_with_the_reason() -> None:
    from qnext_kernels.gated_delta_rule import operation

    reasons = {backend.name: backend.supports(torch.device("cpu"), torch.float16) for backend in operation.backends}
    assert reasons["native"] == "needs torch.float32 or torch.bfloat16, got torch.float16"
    assert reasons["cpu"] is reasons["reference"] is None
