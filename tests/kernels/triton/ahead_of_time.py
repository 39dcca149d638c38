"""Compile what host code launches, for GPUs that are not there: nothing runs, and tensors need no memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from qnext_kernels import layouts, triton_support

SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}
"""Bytes that one program may use (CUDA programming guide, compute capabilities; CDNA 3 and 4 instruction sets)."""
TARGETS = tuple(SHARED_MEMORY)


class Compiled(NamedTuple):
    """A kernel: registers of a thread, bytes a thread keeps in memory for want of them, shared bytes of a program."""

    name: str
    registers: int
    spilled: int
    shared: int
    assembly: str
    layouts: str
    """Triton's last representation that has tensors: it says which thread holds what."""


class Driver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, name: str) -> None:
        self.device = TARGETS.index(name)
        nvidia = name.startswith("sm_")
        self.target = GPUTarget("cuda", int(name[3:]), 32) if nvidia else GPUTarget("hip", name, 64)
        self.utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY[name]})

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def compiling_for(name: str) -> Iterator[list[Compiled]]:
    """Compile each launch for the target instead of running it; the list grows with every kernel that is not in it.

    Triton serves tensors on the meta device meanwhile: they cannot be read, as those of a GPU should not be.
    """
    run, active, why_missing = JITFunction.run, triton.runtime.driver._active, triton_support.why_missing
    compiled: dict[str, Compiled] = {}
    found: list[Compiled] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in compiled:
            compiled[kernel.hash] = _described(kernel)
            found.append(compiled[kernel.hash])

    layouts.forget()
    triton.runtime.driver.set_active(Driver(name))
    JITFunction.run = compile_only
    triton_support.why_missing = lambda kind, index: None if kind == "meta" else why_missing(kind, index)
    try:
        yield found
    finally:
        JITFunction.run = run
        triton_support.why_missing = why_missing
        triton.runtime.driver._active = active
        layouts.forget()


def accesses(kernel: Compiled, instruction: str) -> list[str]:
    """The widths of a kernel's loads (ld) or stores (st) of global memory."""
    return re.findall(rf"{instruction}\.global\.(\S+)", kernel.assembly)


def waits_before_it_touches_memory(kernel: Compiled) -> bool:
    """Whether a kernel that may begin early waits for the launch in front before its first load or store."""
    return 0 < kernel.assembly.find("griddepcontrol.wait") < re.search(r"(ld|st)\.global", kernel.assembly).start()


def _described(kernel: Any) -> Compiled:
    if "cubin" in kernel.asm:
        registers, spilled = _resources_of_cubin(kernel.asm["cubin"])
        assembly = kernel.asm["ptx"]
    else:
        assembly = kernel.asm["amdgcn"]
        registers, spilled = _number(r"\.vgpr_count:", assembly), _number(r"\.private_segment_fixed_size:", assembly)
    return Compiled(kernel.name, registers, spilled, kernel.metadata.shared, assembly, kernel.asm["ttgir"])


def _resources_of_cubin(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    text = usage.stdout + usage.stderr
    return _number("REG:", text), _number("STACK:", text)


def _number(label: str, text: str) -> int:
    match = re.search(rf"{label}\s*(\d+)", text)
    assert match, f"{label} is not in {text[:200]}"
    return int(match.group(1))
