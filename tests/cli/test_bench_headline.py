"""``qnext bench headline``: the arithmetic of the two models, the extrapolation, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qnext_plugins.cli.bench import EngineBench, headline
from qnext_plugins.cli.bench.command import app
from qnext_plugins.cli.bench.headline import HeadlineReport, chunk_offsets, interpolate
from qnext_plugins.cli.bench.models import Qwen32B, QwenNext
from tests.cli.bench_engines import LAYER, OFFSET, REST

CLOCKWORK = EngineBench("clockwork", peers=lambda device: "none", engine="tests.cli.bench_engines:Clockwork")


def run(tmp_path: Path, *arguments: str) -> tuple[int, str, HeadlineReport]:
    file = tmp_path / "report.json"
    fixed = ("--json", str(file), "--csv", str(tmp_path / "table.csv"), "--output", str(tmp_path / "logs"))
    result = CliRunner().invoke(app, ["headline", "--threads", "1", *fixed, *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output, HeadlineReport.model_validate_json(file.read_text())


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headline, "engine_benches", lambda: [CLOCKWORK])


def test_parameters_are_those_that_the_models_are_named_for() -> None:
    next_, dense = QwenNext(), Qwen32B()
    # Every expert of every layer is read where each has a token.
    assert next_.decode_bytes(0, 10**6) - 10**6 * 36 * 2 * 32 * 128 * 128 * 4 == pytest.approx(2 * 79.4e9, rel=0.01)
    assert dense.decode_bytes(0, 1) == pytest.approx(2 * 32.0e9, rel=0.01)
    active = next_.prefill_flops(1) / 2
    assert active == pytest.approx(0.037 * 80e9 + 0.6e9, rel=0.05)


def test_flop_and_bytes_alone_predict_eight_to_eleven_times() -> None:
    next_, dense = QwenNext(), Qwen32B()
    for context in (4096, 32768):
        assert 9 < dense.prefill_flops(context) / next_.prefill_flops(context) < 11
        assert 8 < dense.decode_bytes(context, 1) / next_.decode_bytes(context, 1) < 11


def test_first_middle_and_last_chunk_are_timed_and_the_others_lie_between() -> None:
    assert chunk_offsets(32768, 2048) == [0, 14336, 30720]
    assert chunk_offsets(2048, 2048) == [0]
    assert chunk_offsets(4096, 2048) == [0, 2048]
    assert interpolate({0: 1.0, 10: 2.0, 20: 4.0}, 15) == 3.0
    assert interpolate({0: 1.0, 10: 2.0}, 10) == 2.0


@pytest.mark.usefixtures("clockwork")
def test_layers_are_extrapolated_to_the_depth_and_the_rest_is_not(tmp_path: Path) -> None:
    _, _, report = run(tmp_path, "--context", "4096", "--batch", "2", "--quick")
    assert report.complete
    prefill, decode = report.rows
    assert (prefill.claim, decode.claim) == ("7", "4")
    chunks = sum(LAYER + OFFSET * offset for offset in (0, 2048))
    assert prefill.next.total_ms == pytest.approx((48 * chunks + REST) * 1e3)
    assert prefill.dense.total_ms == pytest.approx((64 * chunks + REST) * 1e3)
    assert prefill.next.tokens_per_second == pytest.approx(4096 / (48 * chunks + REST))
    assert decode.next.tokens_per_second == pytest.approx(2 / (48 * LAYER + REST))
    assert decode.ratio == pytest.approx((64 * LAYER + REST) / (48 * LAYER + REST))
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines if not line.startswith("#")] == ["phase", "prefill", "decode"]


@pytest.mark.usefixtures("clockwork")
def test_times_that_no_machine_reaches_are_said_to_be_disturbed(tmp_path: Path) -> None:
    # A layer of Qwen3-32B in 10 ms is a terabyte a second for a hundred sequences of 4 K.
    status, _, report = run(tmp_path, "--context", "4096", "--batch", "100", "--phase", "decode", "--quick")
    assert status == 2
    assert len(report.rows) == 1
    assert any(
        line.startswith("decode 4096, Qwen3-32B: 643 ms are less than the ") and line.endswith("measure again")
        for line in report.problems
    ), report.problems


@pytest.mark.usefixtures("clockwork")
def test_results_before_an_engine_ends_are_kept_and_its_reason_is_one_line(tmp_path: Path) -> None:
    status, output, report = run(tmp_path, "--context", "4096,32768", "--quick")
    assert status == 2
    assert [(row.phase, row.context) for row in report.rows] == [
        ("prefill", 4096),
        ("decode", 4096),
        ("prefill", 32768),
    ]
    assert report.problems[-1].startswith("Qwen3-Next-80B-A3B: no room for so many tokens; see ")
    assert "Traceback" not in output
    assert not json.loads((tmp_path / "report.json").read_text())["complete"]


def test_no_engine_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headline, "engine_benches", list)
    status, _, report = run(tmp_path)
    assert status == 2
    assert report.problems == ["no engine in this environment can run layer slices: install vLLM beside qnext-plugins"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--context", "5000"), "--context: expected multiples of --chunk, 2048, got 5000"),
        (("--layers", "6"), "--layers: expected a multiple of 4, got 6"),
        (("--phase", "both"), "--phase: expected prefill, decode, or both with a comma, got 'both'"),
        (("--batch", "0"), "--batch: expected positive numbers with commas, such as 1,4, got '0'"),
        (("--threads", "1,2"), "--threads: expected"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments: tuple[str, ...], line: str) -> None:
    result = CliRunner().invoke(app, ["headline", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"qnext bench headline: {line}")
    assert result.stderr.count("\n") == 1
