"""The machine: processor, memory, threads, and the checks of them."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from qnext_plugins.cli.doctor.findings import Finding, Subject, failure, ok, warning
from qnext_plugins.cli.doctor.report import Machine, Threads

INSTRUCTION_SETS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "amx_bf16")
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_PLACES",
    "OMP_PROC_BIND",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "MKL_NUM_THREADS",
    "LD_PRELOAD",
    "VLLM_CPU_OMP_THREADS_BIND",
    "SGLANG_CPU_OMP_THREADS_BIND",
)
CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")


def machine() -> Machine:
    """Describe this machine."""
    import torch

    device = device_type()
    memory = memory_bytes()
    return Machine(
        python=platform.python_version(),
        executable=sys.executable,
        system=platform.platform(),
        glibc=platform.libc_ver()[1] or None,
        torch=torch.__version__,
        device=device,
        device_name=_processor() if device == "cpu" else torch.get_device_module(device).get_device_name(),
        memory_bytes=memory["MemTotal"],
        memory_available_bytes=memory["MemAvailable"],
        instruction_sets=[name for name in INSTRUCTION_SETS if name in cpu_flags()],
    )


def threads() -> Threads:
    """Describe who may compute where."""
    import torch

    return Threads(
        cores=sorted(os.sched_getaffinity(0)),
        cpu_quota=_cpu_quota(),
        torch_threads=torch.get_num_threads(),
        variables={name: os.environ[name] for name in THREAD_VARIABLES if os.environ.get(name)},
    )


def device_type() -> str:
    """What torch would compute on."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def memory_bytes() -> dict[str, int]:
    """Linux' account of the memory, ``MemTotal`` and ``MemAvailable`` among it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {name: int(value.split()[0]) << 10 for name, value in (line.split(":") for line in lines)}


def cpu_flags() -> set[str]:
    """The processor's instruction sets, as Linux names them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def parse_cores(text: str) -> set[int]:
    """Cores of a binding such as ``0-3,6|4,5``; raises ValueError where it is written otherwise."""
    cores: set[int] = set()
    for part in text.replace("|", ",").split(","):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores


def check_binding(variable: str, unbound: tuple[str, ...]) -> Finding | None:
    """Whether the cores of an engine's binding variable are there; ``unbound`` are its words that name no core."""
    value = os.environ.get(variable, "")
    if not value or value in unbound:
        return None
    try:
        missing = parse_cores(value) - os.sched_getaffinity(0)
    except ValueError:
        return _no_binding(variable, f"expected cores such as 0-3|4-7, got {value!r}")
    if missing:
        return _no_binding(variable, f"this process may not run on core {', '.join(map(str, sorted(missing)))}")
    ranks = value.count("|") + 1
    return ok(f"{variable}={value} binds {ranks} rank{'s' if ranks > 1 else ''} to cores that are there")


def _no_binding(variable: str, problem: str) -> Finding:
    return failure(f"{variable}: {problem}", f"unset {variable}: the plugin binds ranks to cores by itself")


def thread_count(subject: Subject) -> Finding:
    """More threads than cores wait for each other; fewer leave cores idle."""
    return judge_threads(threads())


def judge_threads(found: Threads) -> Finding:
    """Whether there are as many threads as cores, of which a container may use but a part."""
    usable = min(len(found.cores), found.cpu_quota or len(found.cores))
    if found.torch_threads > usable + 0.5:
        return warning(
            f"torch computes with {found.torch_threads} threads on {usable:g} usable cores",
            f"export OMP_NUM_THREADS={max(1, int(usable))}",
        )
    # Hyper-threads share a core's arithmetic units: half as many threads as cores is a sound choice.
    if found.torch_threads * 2 < usable:
        return warning(
            f"torch computes with {found.torch_threads} of {usable:g} usable cores",
            "unset OMP_NUM_THREADS, or raise it",
        )
    return ok(f"{found.torch_threads} threads on {usable:g} usable cores")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = next((line for line in lines if line.startswith("model name")), "")
    return named.partition(":")[2].strip() or platform.machine()


def _cpu_quota() -> float | None:
    if not CGROUP_CPU.exists():
        return None
    quota, period = CGROUP_CPU.read_text().split()
    return None if quota == "max" else int(quota) / int(period)
