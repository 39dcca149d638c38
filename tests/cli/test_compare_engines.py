"""``qnext compare`` with both engines and transformers: they agree, and a wrong weight is found, in either dtype.

Runs in SGLang's environment; QNEXT_VLLM_PYTHON names vLLM's.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from examples.compare_tiny import sides
from qnext_plugins.cli.compare.command import compare
from qnext_plugins.cli.compare.report import Kind, Report, Status
from tests.checkpoints import TINY
from tests.cli.compare_checkpoints import write_disturbed_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.sglang,
    pytest.mark.skipif(
        not os.environ.get("QNEXT_VLLM_PYTHON") or find_spec("sglang") is None,
        reason="needs SGLang here and QNEXT_VLLM_PYTHON, the python of vLLM's environment",
    ),
]

app = typer.Typer()
app.command()(compare)


def run(tmp_path: Path, *arguments: str, dtype: str = "float32") -> tuple[int, Report]:
    file = tmp_path / "report.json"
    fixed = ("--dtype", dtype, "--json", str(file), "--output", str(tmp_path / "logs"))
    result = CliRunner().invoke(app, [*arguments, *fixed])
    print(result.output)
    return result.exit_code, Report.model_validate_json(file.read_text())


def test_engines_and_transformers_agree_in_float32_with_drafts(tmp_path: Path) -> None:
    status, report = run(tmp_path, *sides(TINY, ["vllm", "sglang"]), "--html", str(tmp_path / "page.html"))
    assert (status, report.status) == (0, Status.agreement), report.verdict
    assert [side.kind for side in report.sides] == ["vllm", "sglang", "hf"]
    assert all(pair.identical == pair.prompts == 32 and pair.tokens == 2048 for pair in report.pairs)
    assert all(pair.deltas is not None and pair.deltas.largest < 1e-3 for pair in report.pairs)
    for side in report.sides[:2]:
        assert side.served_by is not None
        assert side.dtype == "float32"
        assert side.drafts is not None
        assert 1 < side.drafts.accepted_length < 4
        assert [level.concurrency for level in side.levels] == [1, 4]
        assert all(level.tokens == level.requests * 64 for level in side.levels)
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_engines_are_no_further_from_float32_than_transformers_in_bfloat16(tmp_path: Path) -> None:
    status, report = run(tmp_path, *sides(TINY, ["vllm", "sglang"]), "--no-speed", dtype="bfloat16")
    assert (status, report.status) == (0, Status.agreement), report.verdict
    assert report.verdict[0] == "All agree within rounding: vllm, sglang, hf."
    for side in report.sides[:2]:
        assert [error.dtype for error in side.errors] == ["bfloat16"] * 2
        assert all(error.ratio is not None and error.ratio < 1.1 for error in side.errors)
    # Rounding makes them part, and further than a tie is wide: the criterion has something to decide.
    assert report.pairs[1].partings_of(Kind.rounding)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engine_with_a_wrong_weight_is_the_one_that_is_named(tmp_path: Path, dtype: str) -> None:
    wrong = write_disturbed_checkpoint(tmp_path / "wrong")
    vllm, _ = sides(wrong, ["vllm"], drafts=False)
    sglang, transformers = sides(TINY, ["sglang"], drafts=False)
    few = ("--limit", "8", "--max-tokens", "24", "--no-speed")
    status, report = run(tmp_path, vllm, sglang, transformers, *few, dtype=dtype)
    assert (status, report.status) == (1, Status.disagreement), report.verdict
    assert report.verdict[0] == ("vllm disagrees with the referee hf, sglang agrees with it: the fault is in vllm.")


def test_engines_that_are_told_nothing_fit_beside_each_other(tmp_path: Path) -> None:
    few = ("--limit", "4", "--max-tokens", "8", "--no-speed")
    status, report = run(tmp_path, f"vllm:{TINY} --enforce-eager", f"sglang:{TINY}", f"hf:{TINY}", *few)
    assert (status, report.status) == (0, Status.agreement), report.verdict
    vllm, sglang, _ = report.sides
    assert vllm.notes[0].startswith("started with --gpu-memory-utilization")
    assert sglang.notes[0].startswith("started with --device cpu --mem-fraction-static")
