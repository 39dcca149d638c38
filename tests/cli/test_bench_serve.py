"""``qnext bench serve`` without an engine: what the tools' files say, and what it says where it cannot measure."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qnext_plugins.cli.bench.command import app
from qnext_plugins.cli.bench.serve import ServeReport, tool_here
from qnext_plugins.cli.bench.tools import Load, ToolError, command, progress, read_result
from tests.cli.compare_servers import streaming

DATA = Path(__file__).parent / "data"
LOAD = Load("http://host:1", "vllm", "served", "folder", 64, 16, 4, 2)


def run(tmp_path: Path, *arguments: str) -> tuple[int, str, ServeReport]:
    file = tmp_path / "report.json"
    fixed = ("--json", str(file), "--csv", str(tmp_path / "table.csv"), "--output", str(tmp_path / "logs"))
    result = CliRunner().invoke(app, ["serve", *arguments, *fixed])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.exit_code, result.output, ServeReport.model_validate_json(file.read_text())


def test_result_of_vllm_is_read() -> None:
    level, error = read_result("vllm", (DATA / "bench_vllm.json").read_text(), LOAD)
    assert error is None
    assert (level.completed, level.failed, level.input_tokens, level.output_tokens) == (4, 0, 256, 64)
    assert level.output_tokens_per_second == pytest.approx(64 / level.seconds)
    assert level.first_token.p50 == pytest.approx(28.32, abs=0.01)
    assert level.inter_token.p99 == pytest.approx(16.41, abs=0.01)
    assert level.time_per_token.mean == pytest.approx(9.109, abs=0.001)
    assert level.accepted_length == pytest.approx(1.277, abs=0.001)


def test_result_of_sglang_is_read() -> None:
    level, error = read_result("sglang", (DATA / "bench_sglang.jsonl").read_text(), LOAD)
    assert error is None
    assert (level.completed, level.failed, level.output_tokens) == (4, 0, 64)
    assert level.output_tokens_per_second == pytest.approx(64 / level.seconds)
    assert level.first_token.p50 == pytest.approx(26.72, abs=0.01)
    assert level.accepted_length is None


def test_requests_that_failed_are_counted_and_their_reason_is_one_line() -> None:
    found = json.loads((DATA / "bench_vllm_failed.json").read_text())
    found["errors"] = ["", 'Traceback (most recent call last):\n  File "x"\nConnectionError: no server\n']
    level, error = read_result("vllm", json.dumps(found), LOAD)
    assert (level.completed, level.failed) == (0, 4)
    assert error == "ConnectionError: no server"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"completed": "many"}', "<html>"])
def test_file_that_is_not_a_result_is_one_line(text: str) -> None:
    with pytest.raises(ToolError, match="the result file is not what this version reads") as raised:
        read_result("vllm", text, LOAD)
    assert "\n" not in str(raised.value)


def test_bar_of_the_tool_is_followed_and_that_of_its_warm_up_is_not() -> None:
    log = (DATA / "bench_vllm_bars.txt").read_text()
    assert progress(log, 8) == 8
    assert progress(log[: log.index("5/8 [") + 5], 8) == 5
    assert progress("Starting", 8) == 0


@pytest.mark.parametrize("tool", ["vllm", "sglang"])
def test_command_is_the_engines_own_tool_with_random_tokens(tool: str) -> None:
    line = command(tool, "python", LOAD, Path("/out/result.json"))
    assert ("bench" in line and "serve" in line) if tool == "vllm" else "sglang.bench_serving" in line
    assert line[line.index("--dataset-name") + 1] == {"vllm": "random", "sglang": "random-ids"}[tool]
    assert line[line.index("--max-concurrency") + 1] == "2"
    assert line[line.index("--served-model-name") + 1] == "served"
    assert line[line.index("--backend") + 1] == {"vllm": "openai", "sglang": "vllm"}[tool]


def test_no_server_is_one_line_and_a_report(tmp_path: Path) -> None:
    if (here := tool_here()) is None:
        pytest.skip("needs an engine in this environment")
    status, output, report = run(tmp_path, "http://127.0.0.1:9", "--tool", here)
    assert status == 2
    assert report.problems == ["no server answers at http://127.0.0.1:9"]
    assert "problem: no server answers at http://127.0.0.1:9" in output
    assert report.levels == []
    assert (tmp_path / "table.csv").read_text().startswith("concurrency,")


def test_model_that_is_not_served_is_one_line(tmp_path: Path) -> None:
    if (here := tool_here()) is None:
        pytest.skip("needs an engine in this environment")
    with streaming([]) as url:
        status, _, report = run(tmp_path, url, "--tool", here, "--model", "another")
    assert status == 2
    assert report.problems == [f"--model: {url} serves streamed, got 'another'"]


def test_environment_without_the_engine_is_one_line(tmp_path: Path) -> None:
    absent = next((tool for tool in ("vllm", "sglang") if find_spec(tool) is None), None)
    if absent is None:
        pytest.skip("both engines are in this environment")
    given = (f"--python-{absent}", sys.executable)
    status, _, report = run(tmp_path, f"{absent}:model", *given)
    assert status == 2
    assert report.problems == [
        f"there is no {absent} in the environment of {sys.executable}: give --python-{absent} or set "
        f"QNEXT_{absent.upper()}_PYTHON"
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("nonsense",), "'nonsense': expected a URL (http://...), or vllm:MODEL"),
        (("hf:model",), "SERVER: expected a URL, vllm:MODEL or sglang:MODEL, got 'hf:model'"),
        (("vllm:/nowhere/model",), "'vllm:/nowhere/model': expected a model's folder, and there is no /nowhere/model"),
        (("http://host", "--tool", "ab"), "--tool: expected vllm or sglang, got 'ab'"),
        (("http://host", "--concurrency", "1,x"), "--concurrency: expected positive numbers with commas, such as 1,4"),
        (("http://host", "--json", "/none/x.json"), "--json: expected a file in a folder that can be written to"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments: tuple[str, ...], line: str) -> None:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"qnext bench serve: {line}")
    assert result.stderr.count("\n") == 1
