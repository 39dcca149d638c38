"""The loops of tiles run, emulated where there is no AMX, and each sample is of one kind or of neither."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qnext_kernels import native

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "amx_tiles.py"


def run(isa: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--seconds", "0.2", *options]
    return subprocess.run(command, env=os.environ | {"QNEXT_ISA": isa}, capture_output=True, text=True, check=False)


def usable() -> list[str]:
    return [] if native.why_missing() is not None else list(native.usable_instruction_sets())


@pytest.mark.parametrize("isa", ["amx", "amx-emulated"])
def test_prints_a_product_with_each_number_of_tiles(isa: str, tmp_path: Path) -> None:
    if isa not in usable():
        pytest.skip(f"{isa} does not run on this processor")
    out = tmp_path / "tiles.csv"
    done = run(isa, "--csv", str(out))
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(line for line in out.read_text().splitlines() if not line.startswith("#")))
    assert [row["tiles"] for row in rows] == ["4", "5", "6", "7", "8"]
    for kind in ("asleep_ns", "awake_ns"):
        times = [row[kind] for row in rows]
        assert times == ["-"] * len(rows) or all(float(each) > 1 for each in times)


@pytest.mark.skipif("avx2" not in usable(), reason="needs a C++ compiler and AVX2")
def test_without_amx_says_so() -> None:
    done = run("avx2")
    assert done.returncode == 2
    assert "needs a processor with AMX" in done.stderr
    assert "avx2" in done.stderr
