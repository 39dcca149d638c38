"""``qnext bench`` with real engines: their own tools on the tiny checkpoint, vLLM's kernels, slices in vLLM."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qnext_plugins.cli.bench.command import app
from qnext_plugins.cli.bench.headline import HeadlineReport
from qnext_plugins.cli.bench.kernels import KernelsReport
from qnext_plugins.cli.bench.serve import ServeReport
from qnext_plugins.cli.compare.servers import Server
from qnext_plugins.cli.compare.sides import parse_side
from tests.checkpoints import TINY
from tests.cli.compare_servers import Handler, misbehaving, streaming

SMALL = ("--requests", "4", "--input-tokens", "32", "--output-tokens", "12")
IN_VLLM = (
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM in this environment"),
)
IN_SGLANG = (
    pytest.mark.slow,
    pytest.mark.sglang,
    pytest.mark.skipif(find_spec("sglang") is None, reason="needs SGLang in this environment"),
)


def in_vllm(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that runs in vLLM's environment."""
    for mark in IN_VLLM:
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of vLLM with the tiny checkpoint."""
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        server = Server(parse_side(f"vllm:{TINY} --enforce-eager"), sys.executable, log)
    try:
        asyncio.run(server.ready(300))
        yield server.url
    finally:
        server.stop()


def serve(tmp_path: Path, *arguments: str) -> tuple[int, ServeReport]:
    file = tmp_path / "report.json"
    fixed = ("--json", str(file), "--output", str(tmp_path / "logs"), *SMALL)
    result = CliRunner().invoke(app, ["serve", *arguments, *fixed])
    print(result.output)
    assert "Traceback" not in result.output
    return result.exit_code, ServeReport.model_validate_json(file.read_text())


def check_levels(report: ServeReport, concurrency: list[int]) -> None:
    assert [level.concurrency for level in report.levels] == concurrency
    for level in report.levels:
        assert level.failed == 0
        assert level.output_tokens == 12 * level.requests
        assert level.output_tokens_per_second == pytest.approx(level.output_tokens / level.seconds, rel=0.01)
        assert 0 < level.first_token.p50 <= level.first_token.p99
        assert level.time_per_token.p50 > 0


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(
            f"vllm:{TINY} --enforce-eager "
            """--speculative-config '{"method": "qwen3_next_mtp", "num_speculative_tokens": 2}'""",
            marks=IN_VLLM,
        ),
        pytest.param(
            f"sglang:{TINY} --device cpu --speculative-algo NEXTN --speculative-num-steps 3 "
            "--speculative-eagle-topk 1 --speculative-num-draft-tokens 4",
            marks=IN_SGLANG,
        ),
    ],
)
def test_engine_that_is_started_is_measured_at_every_load_with_its_accepted_length(tmp_path: Path, target: str) -> None:
    status, report = serve(tmp_path, target, "--concurrency", "1,2")
    assert status == 0, report.problems
    check_levels(report, [1, 2])
    assert report.served_by is not None
    assert all(level.accepted_length is not None and 1 <= level.accepted_length <= 4 for level in report.levels)
    assert report.url is not None
    again, report = serve(tmp_path, report.url)
    assert (again, report.problems) == (2, [f"no server answers at {report.url}"]), "it was ended"


@in_vllm
def test_levels_before_a_server_dies_are_kept(tmp_path: Path, vllm_server: str) -> None:
    def dies(handler: Handler, number: int) -> bool:
        """It answers what warms up and the first load, a part of the second, and nothing after that."""
        if number < 9:
            return False
        handler.close_connection = True
        return True

    with misbehaving(vllm_server, dies) as url:
        status, report = serve(tmp_path, url, "--concurrency", "1,2", "--tokenizer", str(TINY))
    assert status == 2
    whole, part = report.levels
    assert (whole.completed, whole.failed) == (4, 0)
    assert 0 < part.completed < 4
    assert report.problems[0].startswith(f"2 at a time: {part.failed} of 4 requests failed: "), report.problems
    assert all("\n" not in line for line in report.problems)


@in_vllm
def test_server_that_streams_rubbish_is_one_line(tmp_path: Path) -> None:
    with streaming(["<html>It works!</html>"]) as url:
        status, report = serve(tmp_path, url, "--concurrency", "1,2", "--tokenizer", str(TINY))
    assert status == 2
    assert report.levels == []
    assert report.problems[0].startswith("1 at a time: ")
    assert report.problems[1] == "2 at a time: not measured after that"


@in_vllm
def test_wrong_tokenizer_is_the_tools_own_error_in_one_line(tmp_path: Path, vllm_server: str) -> None:
    status, report = serve(tmp_path, vllm_server, "--tokenizer", str(tmp_path))
    assert status == 2
    assert report.problems[0].startswith("1 at a time: the tool ended with status 1: ")


@in_vllm
def test_kernels_of_vllm_stand_beside_ours(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    arguments = ("--tiny", "--quick", "--threads", "1", "--ops", "experts,delta rule,conv,attention,linear out,gate")
    result = CliRunner().invoke(app, ["kernels", *arguments, "--json", str(file)])
    assert result.exit_code == 0, result.output
    report = KernelsReport.model_validate_json(file.read_text())
    assert list(report.libraries) == ["vLLM"]
    for row in report.rows:
        if row.op == "experts fp8":  # which vLLM has for GPUs alone
            continue
        (peer,) = row.peers
        assert peer.kernel
        assert peer.ratio == pytest.approx(peer.ms / row.ms)


@in_vllm
def test_both_models_of_the_headline_run_in_vllm(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    cut = ("--experts", "16", "--vocabulary", "2048", "--chunk", "128", "--context", "256", "--eager", "--quick")
    result = CliRunner().invoke(app, ["headline", *cut, "--json", str(file), "--output", str(tmp_path / "logs")])
    report = HeadlineReport.model_validate_json(file.read_text())
    assert report.complete, result.output
    assert report.served_by["Qwen3-Next-80B-A3B"] == "qnext_vllm.model.Qwen3NextForCausalLM"
    assert report.served_by["Qwen3-32B"] == "vllm.model_executor.models.qwen3.Qwen3ForCausalLM"
    assert [row.phase for row in report.rows] == ["prefill", "decode"]
    for row in report.rows:
        # At these sizes only this is certain: a layer takes time, and the dense model's take more.
        assert row.next.layers_ms > 0
        assert row.dense.layers_ms > 0
        assert row.ratio > 1
