"""Compiling ahead of the timing: what is compiled in which process, on a GPU that is not there."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from rich.console import Console
from triton.runtime.jit import JITFunction

from qnext_plugins.cli.arguments import ArgumentError
from qnext_plugins.cli.bench.compiling import only_compiling
from qnext_plugins.cli.bench.inputs import TINY
from qnext_plugins.cli.bench.kernels import KernelsBench, Options
from qnext_plugins.cli.bench.output import Files
from qnext_plugins.cli.progress import Progress
from tests.kernels.triton.ahead_of_time import compiling_for

CONFIGS = [triton.Config({"BLOCK": block}, num_warps=warps) for block in (64, 128, 256) for warps in (1, 4)]


@triton.autotune(configs=CONFIGS, key=["size"])
@triton.jit
def tuned_kernel(x, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < size) + 1.0, mask=at < size)


@triton.jit
def plain_kernel(x, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, 0.0, mask=at < size)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, int, int]]:
    """Of each launch that reaches Triton: the kernel, whether it is only compiled, its block and its warps."""
    seen: list[tuple[str, bool, int, int]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        seen.append((self.fn.__name__, warmup, options["BLOCK"], options.get("num_warps", 4)))

    monkeypatch.setattr(JITFunction, "run", run)
    return seen


def test_each_configuration_is_compiled_in_one_share_and_nothing_is_launched(
    launches: list[tuple[str, bool, int, int]],
) -> None:
    x = torch.empty(300)
    shares = []
    for share in range(4):
        launches.clear()
        with only_compiling(share, 4):
            for size in (300, 301):  # alike for Triton
                tuned_kernel[lambda meta: (triton.cdiv(300, meta["BLOCK"]),)](x, size)
                plain_kernel[(1,)](x, size, BLOCK=512)
        shares.append(list(launches))
    everything = [each for share in shares for each in share]
    wanted = [("tuned_kernel", True, config.kwargs["BLOCK"], config.num_warps) for config in CONFIGS]
    assert sorted(everything) == sorted([*wanted, ("plain_kernel", True, 512, 4)])
    assert max(map(len, shares)) == 2


def test_launches_that_triton_tells_apart_are_compiled_each(launches: list[tuple[str, bool, int, int]]) -> None:
    x = torch.empty(300)
    with only_compiling(0, 1):
        for tensor, size in ((x, 5), (x, 1), (x, 32), (x, 1 << 40), (x.double(), 5), (x[1:], 5), (x[4:], 6)):
            plain_kernel[(1,)](tensor, size, BLOCK=64)
    assert len(launches) == 6


def test_the_shares_of_a_benchmark_compile_between_them_what_its_rows_launch() -> None:
    def compiled_by(share: int, shares: int) -> list[str]:
        chosen = Options(sizes={1: TINY}, ops=("rms", "sigmoid", "silu"), device="meta", peers=False)
        with compiling_for("sm_90") as compiled:
            KernelsBench(chosen, Files(None, None), Progress(Console(quiet=True))).compile(share, shares)
        return sorted(kernel.name for kernel in compiled)

    both = compiled_by(0, 2), compiled_by(1, 2)
    assert all(both)
    assert sorted(both[0] + both[1]) == compiled_by(0, 1)
    assert {"rms_norm_kernel", "gated_rms_norm_kernel", "silu_and_mul_kernel"} < set(both[0] + both[1])


def test_processes_that_compile_get_their_share_and_are_ended_in_time(gpu_ops: ModuleType, tmp_path: Path) -> None:
    script = f"import sys, pathlib, time; share = sys.argv[1].replace('/', '-'); pathlib.Path({str(tmp_path)!r}, share)"
    quick = [sys.executable, "-c", script + ".touch()"]
    with gpu_ops.compiling(quick, 3, 30.0) as wait:
        wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-3", "1-3", "2-3"]
    asleep, began = [sys.executable, "-c", "import time; time.sleep(60)"], time.monotonic()
    with gpu_ops.compiling(asleep, 2, 0.5) as wait:
        wait()
        assert time.monotonic() - began >= 0.5
    with gpu_ops.compiling(asleep, 2, 60.0):
        pass
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("text", ["", "3", "3/", "/3", "3/3", "-1/3", "a/3"])
def test_a_share_that_is_none_is_an_error(gpu_ops: ModuleType, text: str) -> None:
    with pytest.raises(ArgumentError, match="--only-compile: expected I/N, I below N"):
        gpu_ops.share_of(text)
    assert gpu_ops.share_of("2/3") == (2, 3)
