"""``qnext doctor`` in real environments, sound ones and broken ones."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qnext_kernels import OPERATIONS, backend_table, dispatch, force_backend, triton_support
from qnext_kernels.backend_table import Measured, Table, TableError
from qnext_plugins.cli.checkpoint.tensors import describe_int4
from qnext_plugins.cli.doctor import Finding, Status, Subject, kernels, ok
from qnext_plugins.cli.doctor.command import examine
from qnext_plugins.cli.doctor.environment import companions, settings
from qnext_plugins.cli.doctor.findings import run_checks
from qnext_plugins.cli.doctor.kernels import deterministic_mode, judge_determinism, measured_backends, selection
from qnext_plugins.cli.doctor.machine import check_binding, cpu_flags, judge_threads, parse_cores
from qnext_plugins.cli.doctor.report import Threads
from qnext_plugins.settings import Settings
from qnext_vllm.doctor import model_length, openmp_preload, quantization
from tests.checkpoints import TINY

MAIN = "from qnext_plugins.cli.app import main; main()"
ENGINES = ("vllm", "sglang")


def python_of(engine: str) -> str:
    """The Python of the environment that has an engine: this one, or the one that a variable names."""
    if importlib.util.find_spec(engine) is not None:
        return sys.executable
    python = os.environ.get(f"QNEXT_{engine.upper()}_PYTHON")
    if not python:
        pytest.skip(f"QNEXT_{engine.upper()}_PYTHON names no environment with {engine}")
    return python


def doctor(engine: str, *arguments: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """The exit status of ``qnext doctor --json`` in an engine's environment, its report, and its stderr."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QNEXT_", "VLLM_", "SGLANG_"))}
    done = subprocess.run(
        [python_of(engine), "-c", MAIN, "doctor", "--json", *arguments],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def found(report: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Status and message of every check."""
    return {check["name"]: (check["status"], check["message"]) for check in report["checks"]}


@pytest.fixture(scope="class")
def run(engine: str) -> tuple[int, dict[str, Any]]:
    """The doctor in a sound environment, with the trained checkpoint."""
    status, report, _ = doctor(engine, "--model", str(TINY))
    return status, report


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, scope="class")
class TestSound:
    def test_nothing_fails(self, run: tuple[int, dict[str, Any]], engine: str) -> None:
        status, report = run
        failures = {name: message for name, (state, message) in found(report).items() if state == "failure"}
        assert not failures
        assert status == 0
        assert report["healthy"]

    def test_the_engine_serves_our_model(self, run: tuple[int, dict[str, Any]], engine: str) -> None:
        _, report = run
        results = found(report)
        assert results[f"{engine}.registration"][0] == "ok"
        assert results[f"{engine}.plugin_entry_points"][0] == "ok"
        assert results[f"{engine}.engine_version"][0] == "ok"
        (here,) = [entry for entry in report["engines"] if entry["version"] is not None]
        assert here["name"] == engine
        assert here["tested"]

    def test_kernels_and_their_reasons_are_listed(self, run: tuple[int, dict[str, Any]], engine: str) -> None:
        _, report = run
        rows = {(row["operation"], row["dtype"]): row for row in report["backends"]}
        assert rows.keys() == {(name, dtype) for name in OPERATIONS for dtype in ("bfloat16", "float32")}
        assert report["library"]["path"].endswith(".so")
        assert all(row["backend"] == "native" for row in rows.values())
        assert rows["moe", "bfloat16"]["others"]["cpu"] == "serves too"

    def test_the_checkpoint_is_whole(self, run: tuple[int, dict[str, Any]], engine: str) -> None:
        _, report = run
        results = found(report)
        assert {results[f"checkpoint.{name}"][0] for name in ("architecture", "weights", "memory", "tokenizer")} == {
            "ok"
        }

    def test_every_problem_has_a_fix(self, run: tuple[int, dict[str, Any]], engine: str) -> None:
        _, report = run
        assert all(check["fix"] for check in report["checks"] if check["status"] in ("warning", "failure"))


def no_interval(folder: Path) -> Path:
    """A checkpoint whose config.json lacks the interval and the layers' types."""
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["full_attention_interval"], config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def broken_torchvision(folder: Path) -> Path:
    """A torchvision that was made for another torch."""
    package = folder / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    return folder


COMMON = {"PATH": "/nowhere", "QNEXT_BACKENDS": "cpu"}


@pytest.mark.slow
def test_a_broken_vllm_environment_is_told_trap_by_trap(tmp_path: Path) -> None:
    status, report, _ = doctor(
        "vllm",
        "--model",
        str(no_interval(tmp_path / "checkpoint")),
        **COMMON,
        VLLM_PLUGINS="lora_filesystem_resolver",
        VLLM_CPU_OMP_THREADS_BIND="0-4095",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_MQ_MAX_CHUNK_BYTES_MB=str(1 << 20),
        QNEXT_CACHE_DIR=str(tmp_path / "cache"),
    )
    results = found(report)
    assert status == 1
    assert not report["healthy"]
    assert results["vllm.plugins_variable"][0] == "failure"
    assert results["vllm.registration"][0] == "failure"
    assert results["vllm.compiler"][0] == "failure"
    assert results["vllm.threads_bind"][0] == "failure"
    assert results["vllm.shared_memory"][0] == "warning"
    assert results["vllm.memory_utilization"][0] == "ok"
    assert results["vllm.interval"][0] == "warning"
    assert results["kernels.native_library"][0] == "warning"
    assert "needs a C++ compiler once" in results["kernels.native_library"][1]
    state, message = results["environment.settings"]
    assert state == "warning"
    assert message.startswith("QNEXT_BACKENDS: no such setting (there are QNEXT_BACKEND, ")
    assert {row["backend"] for row in report["backends"]} == {"cpu"}
    assert "needs a C++ compiler once" in report["backends"][0]["others"]["native"]


@pytest.mark.slow
def test_a_broken_sglang_environment_is_told_trap_by_trap(tmp_path: Path) -> None:
    status, report, _ = doctor(
        "sglang",
        "--model",
        str(no_interval(tmp_path / "checkpoint")),
        **COMMON,
        SGLANG_PLUGINS="another",
        SGLANG_USE_CPU_ENGINE="1",
        SGLANG_MAMBA_CONV_DTYPE="bfloat16",
        SGLANG_CPU_OMP_THREADS_BIND="first",
        QNEXT_CACHE_DIR=str(tmp_path / "cache"),
    )
    results = found(report)
    assert status == 1
    assert results["sglang.plugins_variable"][0] == "failure"
    assert results["sglang.cpu_engine"][0] == (
        "failure" if "amx_tile" not in report["machine"]["instruction_sets"] else "note"
    )
    assert results["sglang.registration"][0] in ("failure", "warning")
    assert results["sglang.convolution_state"][0] == "warning"
    assert results["sglang.threads_bind"] == (
        "failure",
        "SGLANG_CPU_OMP_THREADS_BIND: expected cores such as 0-3|4-7, got 'first'",
    )
    assert results["sglang.interval"][0] == "failure"


@pytest.mark.slow
def test_sglang_with_another_platform_chosen_is_told(tmp_path: Path) -> None:
    status, report, _ = doctor("sglang", SGLANG_PLATFORM="another")
    results = found(report)
    assert status == 1
    assert results["sglang.platform_variable"][0] == "failure"
    assert "SGLANG_PLATFORM" in results["sglang.platform"][1], "SGLang itself refuses"


@pytest.mark.slow
def test_a_forced_backend_that_does_not_exist_fails_everything_that_computes() -> None:
    engine = "vllm" if importlib.util.find_spec("vllm") else "sglang"
    status, report, _ = doctor(engine, QNEXT_BACKEND="fastest")
    assert status == 1
    state, message = found(report)["environment.settings"]
    assert state == "failure"
    assert "QNEXT_BACKEND" in message
    assert "fastest" in message
    assert report["backends"] == []
    assert [check["name"] for check in report["checks"] if check["status"] == "failure"] == ["environment.settings"]


@pytest.mark.slow
def test_tables_are_printed_without_json() -> None:
    engine = "vllm" if importlib.util.find_spec("vllm") else "sglang"
    command = [python_of(engine), "-c", MAIN, "doctor"]
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert all(title in done.stdout for title in ("qnext-plugins", "Kernels", "Checks"))
    assert "gated_delta_rule" in done.stdout
    assert "→" in done.stdout or done.returncode == 0


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("/nowhere/checkpoint", "--model: expected a folder or a name such as"),
        ("checkpont", "--model: expected a folder or a name such as"),
        (str(Path(__file__).parent), "--model: expected a folder with a config.json"),
    ],
)
def test_a_model_that_is_none_gets_one_line(model: str, line: str) -> None:
    command = [sys.executable, "-c", MAIN, "doctor", "--model", model]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"qnext doctor: {line}")
    assert len(done.stderr.splitlines()) == 1


def test_a_check_that_raises_is_a_failure_of_one_line() -> None:
    def sound(subject: Subject) -> Finding:
        return ok("fine")

    def faulty(subject: Subject) -> Finding:
        raise ValueError("first\nsecond")

    def strict(subject: Subject) -> Finding:
        raise SystemExit("not served")

    results = run_checks("area", (faulty, strict, sound), Subject())
    assert [result.name for result in results] == ["area.faulty", "area.strict", "area.sound"]
    assert [result.status for result in results] == [Status.FAILURE, Status.FAILURE, Status.OK]
    assert results[0].message == "the check ended with ValueError: first second"


@pytest.mark.parametrize(("text", "cores"), [("0-2", {0, 1, 2}), ("1|3", {1, 3}), ("0-1,4|6", {0, 1, 4, 6})])
def test_a_binding_names_its_cores(text: str, cores: set[int]) -> None:
    assert parse_cores(text) == cores


@pytest.mark.parametrize(
    ("cores", "quota", "torch_threads", "status"),
    [
        (64, None, 64, Status.OK),
        (64, None, 32, Status.OK),
        (64, None, 8, Status.WARNING),
        (64, 2.0, 64, Status.WARNING),
        (64, 2.0, 2, Status.OK),
        (2, None, 1, Status.OK),
    ],
)
def test_threads_are_to_be_as_many_as_usable_cores(
    cores: int, quota: float | None, torch_threads: int, status: Status
) -> None:
    found = Threads(cores=list(range(cores)), cpu_quota=quota, torch_threads=torch_threads, variables={})
    assert judge_threads(found).status == status


def test_a_binding_to_cores_that_are_there_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    core = min(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(core))
    finding = check_binding("VLLM_CPU_OMP_THREADS_BIND", ("auto",))
    assert finding is not None
    assert finding.status == Status.OK
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    assert check_binding("VLLM_CPU_OMP_THREADS_BIND", ("auto",)) is None


def test_two_preloaded_openmp_runtimes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libgomp.so.1:/opt/libiomp5.so")
    finding = openmp_preload(Subject())
    assert finding is not None
    assert finding.status == Status.FAILURE
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libgomp.so.1")
    assert openmp_preload(Subject()) is None


def test_yarn_in_the_dialect_of_the_published_model_needs_a_variable_in_vllm() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
    published = {"max_position_embeddings": 262144, "rope_scaling": scaling}
    finding = model_length(Subject(config=published))
    assert finding is not None
    assert finding.status == Status.NOTE
    assert "up to 262144, not up to 1048576" in finding.message
    finding = model_length(Subject(config=published | {"max_position_embeddings": 1048576}))
    assert finding is not None
    assert finding.status == Status.OK


@pytest.mark.parametrize("block", [[128, 128], [64, 64], None])
def test_whose_kernels_serve_fp8_on_a_cpu_is_told(block: list[int] | None) -> None:
    finding = quantization(Subject(config={"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}))
    assert finding is not None
    of_vllm = Status.NOTE if "amx_tile" in cpu_flags() else Status.FAILURE
    assert finding.status == (Status.OK if block == [128, 128] else of_vllm)
    assert quantization(Subject(config={})) is None


@pytest.mark.parametrize("symmetric", [True, False])
def test_whose_kernels_serve_int4_on_a_cpu_is_told(symmetric: bool) -> None:
    described = describe_int4([], 64)
    described["config_groups"]["group_0"]["weights"]["symmetric"] = symmetric
    finding = quantization(Subject(config={"quantization_config": described}))
    assert finding is not None
    assert finding.status == (Status.OK if symmetric else Status.NOTE)
    assert ("groups of 64" if symmetric else "(symmetric is False)") in finding.message


@pytest.mark.parametrize("method", ["gptq", "auto-round"])
@pytest.mark.parametrize("bits", [4, 8])
def test_so_it_is_of_gptq_and_autoround(method: str, bits: int) -> None:
    described = {"quant_method": method, "bits": bits, "group_size": 64, "sym": True}
    finding = quantization(Subject(config={"quantization_config": described}))
    assert finding is not None
    assert finding.status == (Status.OK if bits == 4 else Status.NOTE)
    assert ("groups of 64" if bits == 4 else "(num_bits is 8)") in finding.message


@pytest.mark.parametrize(("variable", "value"), [("QNEXT_STRICT", "maybe"), ("QNEXT_DISABLE", "2x")])
def test_a_setting_of_a_wrong_value_is_told(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    finding = settings(Subject())
    assert finding.status == Status.FAILURE
    assert finding.message == f"{variable}: expected 1 or 0, got {value!r}"
    report = examine(Subject())
    assert [check.name for check in report.checks if check.status == Status.FAILURE] == ["environment.settings"]


@pytest.mark.parametrize("variable", ["QNEXT_BACKEND", "QNEXT_CACHE_DIR", "QNEXT_DETERMINISTIC", "QNEXT_STRICT"])
def test_an_empty_variable_is_one_that_is_not_set(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Settings()
    monkeypatch.setenv(variable, "")
    assert Settings() == expected
    assert settings(Subject()).status == Status.OK


def test_a_companion_package_that_does_not_load_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = broken_torchvision(tmp_path / "site")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    finding = companions(Subject())
    assert finding.status == Status.FAILURE
    assert "operator torchvision::nms does not exist" in finding.message
    assert "nor do transformers' models" in finding.message
    assert "pip uninstall --yes torchvision" in str(finding.fix)


BLOCK_WISE = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("environment", "config", "status"),
    [
        ({}, None, Status.OK),
        ({"QNEXT_DETERMINISTIC": "1"}, None, Status.OK),
        ({"QNEXT_DETERMINISTIC": "1"}, {"quantization_config": BLOCK_WISE}, Status.OK),
        ({"QNEXT_DETERMINISTIC": "1"}, {"quantization_config": describe_int4([], 32)}, Status.OK),
        ({"QNEXT_DETERMINISTIC": "1"}, {"quantization_config": describe_int4([], 16)}, Status.FAILURE),
        ({}, {"quantization_config": {"quant_method": "fp8"}}, Status.NOTE),
        ({"QNEXT_DETERMINISTIC": "1"}, {"quantization_config": {"quant_method": "fp8"}}, Status.FAILURE),
    ],
)
def test_whether_the_deterministic_mode_can_be_served_is_told(
    environment: dict[str, str], config: dict[str, Any] | None, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    finding = deterministic_mode(Subject(config=config))
    assert finding.status == status
    assert "QNEXT_DETERMINISTIC=1" in finding.message


def test_an_operation_without_a_batch_invariant_kernel_is_named() -> None:
    with force_backend("linear=cpu"):
        finding = judge_determinism("QNEXT_DETERMINISTIC=1", True, Subject())
    assert finding.status == Status.FAILURE
    assert finding.message == "QNEXT_DETERMINISTIC=1 cannot be served: no batch-invariant kernel for linear"
    assert "unset QNEXT_DETERMINISTIC" in str(finding.fix)


def test_on_a_gpu_the_deterministic_mode_is_served_beside_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "device_type", lambda: "cuda")
    monkeypatch.setattr(triton_support, "why_missing", lambda device_type, index: None)
    finding = judge_determinism("VLLM_BATCH_INVARIANT=1", True, Subject(config={"quantization_config": {}}))
    assert finding.status == Status.OK
    assert "beside the engine's own mode" in finding.message


def test_on_a_gpu_the_kernels_that_serve_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "device_type", lambda: "cuda")
    monkeypatch.setattr(triton_support, "why_missing", lambda device_type, index: None)
    finding = selection(Subject())
    assert (finding.status, finding.message) == (
        Status.OK,
        "triton kernels serve all 6 operations in bfloat16 and float32; linear and paged_attention are the engine's",
    )
    monkeypatch.setattr(triton_support, "why_missing", lambda device_type, index: "triton is not installed")
    assert selection(Subject()).status == Status.WARNING


def test_what_was_measured_on_the_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    key = ("gated_delta_rule", "prefill", torch.bfloat16, (16, 32, 128, 128))
    lines = [Measured("NVIDIA H200", key, 2048, "triton", 0.3), Measured("NVIDIA H200", key, 8192, "flashinfer", 0.9)]
    monkeypatch.setattr(dispatch, "measured_backends", lambda: Table(lines))
    assert measured_backends(Subject()) is None
    monkeypatch.setattr(kernels, "device_type", lambda: "cuda")
    monkeypatch.setattr(backend_table, "device_names", lambda index: ("NVIDIA H200", "sm_90"))
    told = measured_backends(Subject())
    assert told is not None
    assert (told.status, told.message) == (
        "ok",
        "measured as the fastest on NVIDIA H200: gated_delta_rule.prefill 16x32x128x128 of 2048 tokens: triton; "
        "gated_delta_rule.prefill 16x32x128x128 of 8192 tokens: flashinfer",
    )
    monkeypatch.setattr(backend_table, "device_names", lambda index: ("NVIDIA B200", "sm_100"))
    told = measured_backends(Subject())
    assert told is not None
    assert told.message == "no backend has been measured on NVIDIA B200: the first that supports a call serves it"


def test_a_broken_table_of_backends_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Table:
        raise TableError("backend_table.csv:3: tokens: expected a positive number, got '0'")

    monkeypatch.setattr(dispatch, "measured_backends", broken)
    told = measured_backends(Subject())
    assert told is not None
    assert (told.status, told.message) == (
        "failure",
        "backend_table.csv:3: tokens: expected a positive number, got '0'",
    )
