"""The table of measured backends, written from results that nobody has measured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import write_backend_table
from qnext_kernels.backend_table import Table, read
from qnext_kernels.dispatch import BACKEND_NAMES, OPERATION_NAMES

HEADER = "op,shape,ours_ms,backend,peer,peer_ms,ratio,roof_pct"
GPU = "# device: NVIDIA H200, sm_90, 132 multiprocessors, 140 GiB, L2 60 MiB; driver 580, CUDA 13.0"
DELTA_RULE = (16, 32, 128, 128)
ROWS = [
    "delta rule prefill,T=2048,0.30,triton,fla chunk,0.4,1.3,50",
    "delta rule prefill,T=2048,0.30,triton,flash_qla chunk,0.1,0.3,50",
    "delta rule prefill,T=2048,0.20,flashinfer,,,,60",
    "delta rule prefill,T=2048,0.21,flash_qla,,,,60",
    "delta rule prefill,T=8192,1.00,triton,,,,50",
    "delta rule prefill,T=8192,0.97,flashinfer,,,,50",
    "delta rule prefill,T=8192 N=16 ragged,0.50,flashinfer,,,,50",
    "delta rule prefill,T=32768 N=16 ragged tp=2,0.50,triton,,,,50",
    "delta rule prefill,T=32768 N=16 ragged tp=2,0.90,flashinfer,,,,50",
    "delta rule prefill,T=2048 tp=2,0.05,triton,,,,50",
    "delta rule prefill,T=2048 tp=2,0.04,flashinfer,,,,50",
    "delta rule prefill,T=8192 tp=4,0.30,triton,,,,50",
    "delta rule prefill,T=8192 tp=4,0.20,flash_qla,,,,50",
    "delta rule decode,B=8,0.02,triton,,,,50",
    "delta rule decode,B=8,0.01,flashinfer,,,,50",
    'delta rule decode,"B=8",0.30,reference,,,,1',
    "delta rule verify,B=8 × 3 tokens,0.02,triton,,,,50",
    "delta rule verify,B=8 × 3 tokens,0.5,reference,,,,50",
    '"delta rule decode, one by one",B=8,0.001,reference,,,,',
    "experts,M=8,0.5,triton,,,,80",
    "rms norm + residual,T=64,0.004,flashinfer,,,,",
]


def run(folder: Path, rows: list[str], *options: str, header: str = HEADER, gpu: str = GPU) -> int:
    (folder / "results.csv").write_text("\n".join([gpu, header, *rows]) + "\n")
    return write_backend_table.main([str(folder / "results.csv"), "--table", str(folder / "table.csv"), *options])


def table(folder: Path) -> Table:
    return read(folder / "table.csv", OPERATION_NAMES, BACKEND_NAMES)


def test_segments_beside_each_other_serve_only_where_they_are_asked_for(tmp_path: Path) -> None:
    rows = ["T=8192 tp=8,0.14,triton,,,,4", "T=8192 tp=8,0.08,triton_context_parallel,,,,8"]
    assert run(tmp_path, [f"delta rule prefill,{row}" for row in rows]) == 0
    assert not table(tmp_path).lines


def test_the_fastest_backend_of_every_case_is_written(tmp_path: Path) -> None:
    assert run(tmp_path, ROWS) == 0
    found = {(*line.key[:2], line.key[3], line.tokens): (line.backend, line.ms) for line in table(tmp_path).lines}
    assert found == {
        ("gated_delta_rule", "decode", DELTA_RULE, 8): ("flashinfer", 0.01),
        ("gated_delta_rule", "prefill", DELTA_RULE, 2048): ("flashinfer", 0.20),
        # Three hundredths faster is not enough to go before one that stands before it.
        ("gated_delta_rule", "prefill", DELTA_RULE, 8192): ("triton", 1.0),
        # Of as many tokens a sequence one backend is faster for many sequences, the other for one.
        ("gated_delta_rule", "prefill", (8, 16, 128, 128), 2048): ("triton", 0.50),
        ("gated_delta_rule", "prefill", (4, 8, 128, 128), 8192): ("flash_qla", 0.20),
        ("gated_delta_rule", "verify", DELTA_RULE, 24): ("triton", 0.02),
    }
    assert {line.device for line in table(tmp_path).lines} == {"NVIDIA H200"}
    key = ("gated_delta_rule", "prefill", torch.bfloat16, DELTA_RULE)
    assert table(tmp_path).fastest(["NVIDIA H200", "sm_90"], key, 3000) == "flashinfer"


def test_new_lines_replace_those_of_the_same_gpu_and_sizes_and_no_others(tmp_path: Path) -> None:
    assert run(tmp_path, ROWS) == 0
    before = table(tmp_path).lines
    newer = ["delta rule decode,B=16,0.02,triton,,,,50", "delta rule decode,B=16,0.1,flashinfer,,,,50"]
    assert run(tmp_path, newer) == 0
    after = table(tmp_path).lines
    decode = [line for line in after if line.key[1] == "decode"]
    assert [(line.tokens, line.backend) for line in decode] == [(16, "triton")]
    assert [line for line in after if line.key[1] != "decode"] == [line for line in before if line.key[1] != "decode"]
    assert run(tmp_path, newer, "--device", "sm_100") == 0
    assert [line for line in table(tmp_path).lines if line.device != "sm_100"] == list(after)


def test_the_margin_decides_what_is_enough(tmp_path: Path) -> None:
    assert run(tmp_path, ROWS, "--margin", "0") == 0
    (line,) = (line for line in table(tmp_path).lines if line.tokens == 8192 and line.key[3] == DELTA_RULE)
    assert line.backend == "flashinfer"


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {"header": "op,shape"}, "results.csv: expected the columns op,shape,ours_ms,"),
        ([], {"gpu": "# a machine"}, "results.csv: no comment says which GPU it was"),
        (["delta rule decode,B=8"], {}, "results.csv:3: expected 8 values, got 2"),
        ([ROWS[0].replace("0.30", "-1")], {}, "results.csv:3: ours_ms: expected a positive number, got '-1'"),
        ([ROWS[0].replace("triton", "tritium")], {}, "results.csv:3: backend: expected one of reference, .*'tritium'"),
    ],
)
def test_broken_results_are_refused_with_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[str], changes: dict[str, str], message: str
) -> None:
    assert run(tmp_path, rows, **changes) == 2
    assert not (tmp_path / "table.csv").exists()
    error = capsys.readouterr().err
    assert error.startswith("write_backend_table.py: ")
    assert re.search(message, error), error


def test_the_script_runs_alone(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("\n".join([GPU, HEADER, *ROWS]))
    command = [
        sys.executable,
        write_backend_table.__file__,
        tmp_path / "results.csv",
        "--table",
        tmp_path / "table.csv",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "NVIDIA H200,gated_delta_rule,decode,bfloat16,16x32x128x128,8,flashinfer,0.01" in done.stdout.splitlines()
