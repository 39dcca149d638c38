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


@pytest.fixture
def cute(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """FlashInfer's class of kernels in CuTe, which says what is asked of it."""

    class JitSpecCuteDsl:
        def __init__(self, kept: bool) -> None:
            self.kept, self.said = kept, list[str]()

        def build_and_load(self) -> str:
            return "one by one"

        def try_load(self) -> str | None:
            return "from the disk" if self.kept else None

        def compile_and_persist(self) -> None:
            self.said.append("compiled")

        def load(self) -> str:
            return "loaded"

    module = ModuleType("cute_dsl_core")
    module.JitSpecCuteDsl = JitSpecCuteDsl  # type: ignore[attr-defined]
    for name in ("flashinfer", "flashinfer.jit", "flashinfer.jit.cute_dsl_core"):
        monkeypatch.setitem(sys.modules, name, module)
    return JitSpecCuteDsl


def test_flashinfer_compiles_in_every_process_at_once_while_others_do(cute: type[Any]) -> None:
    new, kept = cute(kept=False), cute(kept=True)
    with only_compiling(0, 2):
        assert (new.build_and_load(), new.said) == ("loaded", ["compiled"])
        assert (kept.build_and_load(), kept.said) == ("from the disk", [])
    assert new.build_and_load() == "one by one"


def test_a_backend_that_triton_does_not_compile_is_called_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, int]] = []
    chosen = Options(sizes={1: TINY}, ops=("rms norm",), device="meta", peers=False)

    def forced(choice: object) -> Any:
        called.append((str(choice), share))
        raise RuntimeError("it is enough to have been asked")

    monkeypatch.setattr("qnext_plugins.cli.bench.kernels.force_backend", forced)
    monkeypatch.setattr(KernelsBench, "_backends", lambda self, row: ["triton", "flashinfer", "flash_qla"])
    for share in range(3):
        with compiling_for("sm_90"):
            KernelsBench(chosen, Files(None, None), Progress(Console(quiet=True))).compile(share, 3)
    by_name = {name: [share for choice, share in called if name in choice] for name in ("triton", "flashinfer")}
    rows = len(by_name["flashinfer"])
    assert rows > 1
    assert len(by_name["triton"]) == 3 * rows
    assert sorted(by_name["flashinfer"]) == sorted(number % 3 for number in range(rows))


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
