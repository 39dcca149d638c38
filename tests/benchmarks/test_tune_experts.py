"""The tuner of the experts writes what calls read; kernels are interpreted and the clock is the test's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qnext_kernels.moe import triton_align, triton_experts, triton_fp8
from qnext_kernels.moe.configurations import Shape, load, save
from qnext_kernels.triton_support import Target
from tests.benchmarks.conftest import script
from tests.kernels.triton.interpreter import interpreted


@pytest.fixture(scope="module")
def tuner() -> ModuleType:
    return script("tune_experts")


def test_only_what_has_blocks_and_is_missing_is_measured_again(tuner: ModuleType) -> None:
    shape = Shape(tuner.EXPERTS, tuner.HIDDEN, tuner.MIDDLE // 4, tuner.TOP_K, "bfloat16")
    target = Target(nvidia=True, shared_memory=227 << 10, tensor_maps=True, wgmma=True)
    assert tuner.counts_of(shape, (1, 64, 4096), {}, target) == [64, 4096]
    assert tuner.counts_of(shape, (1, 64, 4096), {64: None}, target) == [4096]


@pytest.mark.parametrize("weights", ["bfloat16", "float8_e4m3fn"])
def test_the_fastest_candidate_is_written(tuner: ModuleType, tmp_path: Path, weights: str) -> None:
    torch.manual_seed(0)
    shape = Shape(experts=3, hidden=64, middle=32, top_k=2, weights=weights)
    measured: list[object] = []

    def clock(run: Callable[[], object]) -> float:
        measured.append(run())
        return 1.0 / len(measured)

    with interpreted(triton_align, triton_experts, triton_fp8):
        best = tuner.tune(shape, 3, "cpu", clock)
        _, possible = tuner.both(shape, 32)
    # The last one is the fastest here, with twice the rows of the rule.
    assert best.rows == 32
    assert best.down == possible[-1]
    save(tmp_path / "gpu.json", "3.8.0", {shape: {3: best}})
    assert load(tmp_path / "gpu.json") == {shape: {3: best}}
