"""A run of gpu_ops.py for which the time is not enough: what comes first, and how the next one goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qnext_plugins.cli.arguments import ArgumentError
from qnext_plugins.cli.bench.inputs import GPU, GPU_FIRST, Row
from qnext_plugins.cli.bench.kernels import KernelsBench, Measured
from qnext_plugins.cli.bench.output import Files
from qnext_plugins.cli.progress import Progress
from tests.cli.test_bench_gpu import SMALL, options, quiet, rows_of, synthetic

__all__ = ["quiet"]
H200 = "NVIDIA H200"


def names(rows: list[Row] | list[Measured]) -> list[tuple[str, str]]:
    return [(row.op, row.shape) for row in rows]


def bench_of(gpu_ops: ModuleType, progress: Progress, files: Files | None = None, **changes: Any) -> KernelsBench:
    return KernelsBench(options(**changes), files or Files(None, None), progress, gpu_ops.OpsReport)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_what_comes_first_is_of_all_shapes_and_has_the_largest_batch_and_the_longest_prefill(ranks: int) -> None:
    first = names(rows_of(GPU_FIRST.shard(ranks)))
    assert set(first) <= set(names(rows_of(GPU.shard(ranks))))
    assert {("delta rule decode", f"B={batch}") for batch in (64, 1024)} < set(first)
    assert ("delta rule prefill", "T=65536") in first


def test_what_comes_first_is_measured_once_and_before_everything_else(gpu_ops: ModuleType, quiet: Progress) -> None:
    few = replace(SMALL, batches=(3,), expert_tokens=(50,), rows=(20,))
    rows = [row for group in bench_of(gpu_ops, quiet, first={1: few}).rows() for row in group]
    assert len(set(names(rows))) == len(rows)
    assert set(names(rows)) == set(names(rows_of(SMALL)))
    first = set(names(rows_of(few)))
    assert set(names(rows[: len(first)])) == first < set(names(rows))


def test_the_next_run_keeps_the_lines_and_measures_only_what_is_missing(
    gpu_ops: ModuleType, quiet: Progress, tmp_path: Path
) -> None:
    file = tmp_path / "ops.csv"
    files, ops = Files(None, file), ("rms norm + residual", "router")
    bench_of(gpu_ops, quiet, files, ops=ops[:1]).run()
    written = file.read_text().splitlines()
    args = gpu_ops.parse(["--resume", "--csv", str(file)])
    file.write_text("\n".join([f"# device: {H200}, sm_90", *written, ""]))  # which a CPU's header does not say
    before = gpu_ops.lines_before(args, H200)
    bench = bench_of(gpu_ops, quiet, files, ops=ops, measured=gpu_ops.options_of(args, before).measured)
    bench.report.before = before
    bench.run()
    assert {row.op for row in bench.report.rows} == {"router top-k"}
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert lines[: 1 + len(before)] == [line for line in written if not line.startswith("#")]
    assert len(lines) > 1 + len(before) > 1


def test_lines_of_an_earlier_run_are_written_as_they_were(gpu_ops: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "ops.csv"
    Files(None, file).write(synthetic(gpu_ops))
    text = file.read_text()
    before = gpu_ops.lines_before(gpu_ops.parse(["--resume", "--csv", str(file)]), H200)
    report = gpu_ops.OpsReport(device="cuda", backends={}, libraries={}, absent={}, rows=[], before=before)
    report.header = synthetic(gpu_ops).header
    Files(None, file).write(report)
    assert file.read_text() == text
    measured = gpu_ops.options_of(gpu_ops.parse([]), before).measured
    assert measured == {("delta rule decode", "B=1 tp=4"), ("delta rule decode", "B=64 tp=4"), ("experts", "M=4")}


def test_resuming_refuses_the_file_of_another_gpu_and_needs_one(gpu_ops: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "ops.csv"
    arguments = gpu_ops.parse(["--resume", "--csv", str(file)])
    assert gpu_ops.lines_before(arguments, H200) == []
    Files(None, file).write(synthetic(gpu_ops))
    with pytest.raises(ArgumentError, match=f"expected results of NVIDIA H100 PCIe in .*, got those of {H200}"):
        gpu_ops.lines_before(arguments, "NVIDIA H100 PCIe")
    with pytest.raises(ArgumentError, match="--resume: expected --csv FILE"):
        gpu_ops.lines_before(gpu_ops.parse(["--resume"]), H200)
    with pytest.raises(ArgumentError, match="--within: expected a number of seconds above 0"):
        gpu_ops.options_of(gpu_ops.parse(["--within", "0"]))


def test_within_asks_for_all_shapes_of_every_rank_with_short_turns(gpu_ops: ModuleType) -> None:
    chosen = gpu_ops.options_of(gpu_ops.parse(["--within", "420", "--tp", "4,1"]))
    assert (list(chosen.first), list(chosen.sizes), chosen.last_start) == ([4, 1], [4, 1], 420)
    assert (chosen.sizes[1], chosen.first[1]) == (GPU, GPU_FIRST)
    assert chosen.seconds < gpu_ops.options_of(gpu_ops.parse([])).seconds


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_second_run_on_a_gpu_measures_nothing_again(gpu_ops: ModuleType, tmp_path: Path) -> None:
    arguments = ["--tiny", "--ops", "rms norm + residual", "--peers", "none", "--csv", str(tmp_path / "ops.csv")]
    assert gpu_ops.main(arguments) == 0
    lines = [line for line in (tmp_path / "ops.csv").read_text().splitlines() if not line.startswith("#")]
    assert gpu_ops.main([*arguments, "--resume", "--within", "60"]) == 0
    assert [line for line in (tmp_path / "ops.csv").read_text().splitlines() if not line.startswith("#")] == lines
