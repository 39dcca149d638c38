"""Our kernels beside vLLM's own: the script runs, both sides agree, and every row has a peer."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from qnext_kernels import native

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cpu_ops.py"


@pytest.mark.skipif(native.why_missing() is not None, reason="needs a C++ compiler and AVX2")
def test_small_rows_agree_with_vllm_and_are_written(tmp_path: Path) -> None:
    out = tmp_path / "ops.csv"
    options = ["--tiny", "--threads", "1", "--ops", "experts,attention", "--csv", str(out)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader(line for line in out.read_text().splitlines() if not line.startswith("#")))
    assert {row["op"] for row in rows} == {"experts", "attention prefill", "attention decode", "attention verify"}
    assert all(float(row["ratio"]) > 0 for row in rows)
