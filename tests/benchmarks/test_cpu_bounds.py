"""The bounds of the CPU: loops that run, and rows that find what cpu_ops.py measured."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from qnext_kernels import native

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.skipif(native.why_missing() is not None, reason="needs a C++ compiler and AVX2")
def test_a_row_has_the_bound_and_what_was_measured(tmp_path: Path) -> None:
    results, out = tmp_path / "ops.csv", tmp_path / "bounds.csv"
    results.write_text(
        "# of this machine\nop,shape,threads,ours_ms,peer,peer_ms,ratio,roof_pct\n"
        "delta rule verify,B=8 × 3 tokens,1,4000,theirs,8000,2,1\n"
    )
    command = [sys.executable, str(BENCHMARKS / "cpu_bounds.py"), "--threads", "1", "--results", str(results)]
    done = subprocess.run([*command, "--csv", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in out.read_text().splitlines() if not line.startswith("#")]
    rows = {(row["op"], row["shape"]): row for row in csv.DictReader(lines)}
    row = rows["delta rule verify", "B=8 × 3 tokens"]
    assert row["bound"] == "memory, copy to 3"
    least = float(row["least_ms"])
    # A state is 2 MiB, and memory between 1 GB/s and 1 TB/s.
    assert 8 * 4 * 2.1e6 / 1e12 < least / 1e3 < 8 * 4 * 2.1e6 / 1e9
    assert row["bound_pct"] == f"{100 * least / 4000:.0f}"
    assert float(row["most_ratio"]) == pytest.approx(8000 / least, rel=1e-3)
    assert rows["delta rule decode", "B=8"]["ours_ms"] == "-"
