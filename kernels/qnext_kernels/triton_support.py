"""What the Triton backends share: when they serve, what the GPU at hand allows, and how tensors are handed to kernels.

Kernels lie in modules of their own, imported with the first call: a process that serves on a CPU never imports Triton.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext_kernels.dispatch import Backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16
"""Bytes of the widest load of a thread. Triton compiles a second kernel for pointers that are not multiples of it."""

VECTOR = 8
"""Elements of a thread: 16 bytes in bfloat16. With more, the few rows of a step have few threads, which take long."""
ELEMENTS = 1024
"""Of short rows, so many belong to one program, which has four warps. An H200 starts at most one a nanosecond."""


class TritonBackend(Backend):
    """Serves tensors on GPUs of NVIDIA and AMD (PyTorch calls both cuda), and on a CPU where Triton interprets."""

    name = "triton"
    devices = ("cuda",)

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if not dtype.is_floating_point:
            return f"needs a floating-point dtype, got {dtype}"
        if dtype not in DTYPES:
            return f"computes in {', '.join(map(str, DTYPES))}, got {dtype}"
        return why_missing(device.type, device.index)


# Not traced by torch.compile, in whose graphs the answer is a constant.
@torch.compiler.assume_constant_result
def why_missing(device_type: str, index: int | None) -> str | None:
    """None where Triton serves this device, else the reason."""
    if not _installed():
        return "triton is not installed"
    if device_type == "cpu" and interpreting():
        return None
    if device_type not in TritonBackend.devices:
        return f"runs on {'/'.join(TritonBackend.devices)}, not on {device_type}"
    return _unsuitable(index)


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _unsuitable(index: int | None) -> str | None:
    """Why the GPU of this index cannot run the kernels; None if it can."""
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(index)) < (8, 0):
        return f"needs compute capability 8.0, got {'.'.join(map(str, capability))}"
    return None


class Target(NamedTuple):
    """What a kernel is configured for."""

    nvidia: bool
    shared_memory: int
    """Bytes that one program may use."""
    e4m3: bool = True
    """Whether it multiplies e4m3."""
    overlaps: bool = False
    """Whether a launch can begin before the one in front has ended."""
    tensor_maps: bool = False
    """Whether it loads tiles of tensors that are described to it: NVIDIA's GPUs from Hopper on."""
    wgmma: bool = False
    """Whether four warps multiply 64 rows from their registers: Hopper."""

    def precision(self, dtype: torch.dtype) -> str:
        """``input_precision`` of products of float32 matrices, where the activations are of this dtype.

        tf32x3 has the accuracy of float32 at three times the cost of tf32, which has the ten bits of float16.
        """
        if not self.nvidia:
            return "ieee"
        return "tf32x3" if dtype == torch.float32 else "tf32"


def current_target() -> Target:
    """The current GPU; an interpreter is taken for a large one."""
    from triton.runtime import driver

    if interpreting():
        return Target(nvidia=True, shared_memory=1 << 20, tensor_maps=True, wgmma=True)
    return _target(driver.active, driver.active.get_current_device())


@cache
def _target(driver: Any, device: int) -> Target:
    properties = driver.utils.get_device_properties(device)
    backend, arch = (gpu := driver.get_current_target()).backend, gpu.arch
    nvidia = backend == "cuda"
    e4m3 = arch >= 89 if nvidia else arch == "gfx950"
    hopper_on = nvidia and arch >= 90
    return Target(nvidia, properties["max_shared_mem"], e4m3, hopper_on, hopper_on, nvidia and arch == 90)


def rows(x: Tensor) -> Tensor:
    """``x`` with a last dimension of unit stride, copied only where it has another."""
    return x if x.stride()[-1] == 1 else x.contiguous()


def aligned_rows(x: Tensor, alignment: int = ALIGNMENT) -> Tensor:
    """:func:`rows` from an aligned address: what Triton compiles depends on it, and so the bits might."""
    x = rows(x)
    return x if x.data_ptr() % alignment == 0 else x.clone(memory_format=torch.contiguous_format)


def vector_of(width: int, dtype: torch.dtype) -> int:
    """How many elements of a row of ``width`` a thread can load at once, whichever row it is."""
    return gcd(width, ALIGNMENT // dtype.itemsize)


def vector_rows(x: Tensor, vector: int) -> tuple[Tensor, int, int]:
    """[..., D] as outer × inner rows: the tensor that holds them, and how many vectors lie between two of either.

    It is copied only where no view does, or where a row begins inside a vector: so what Triton compiles, and with it
    the order of a sum, follows from shapes and dtypes alone.
    """
    if x.is_contiguous() and (vector == 1 or x.data_ptr() % ALIGNMENT == 0):
        inner = x.shape[-1] // vector
        return x, inner_rows(x) * inner, inner
    x = rows(x.flatten(0, -3) if x.dim() > 3 else x)
    outer, inner = _outer_and_inner(x)
    if vector > 1 and (x.data_ptr() % ALIGNMENT or outer % vector or inner % vector):
        x = x.clone(memory_format=torch.contiguous_format)
        outer, inner = _outer_and_inner(x)
    return x, outer // vector, inner // vector


def inner_rows(x: Tensor) -> int:
    """How many of the rows that :func:`vector_rows` returned lie ``inner`` from each other."""
    return x.shape[-2] if x.dim() > 1 else 1


@cache
def row_tile(width: int, elements: int = ELEMENTS) -> dict[str, int]:
    """Block sizes and warps of a program that holds whole rows: ``elements`` of short ones, VECTOR of them a thread.

    They follow from the width alone, so that a row has the same bits in any batch.
    """
    block = power_of_two(width)
    rows = max(1, elements // block)
    warps = min(16, rows * block // (32 * VECTOR))
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps, "num_stages": 1}


def _outer_and_inner(x: Tensor) -> tuple[int, int]:
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    outer, inner, _ = (0, 0, *strides)[-3:]
    return outer, inner


def ceil_div(x: int, y: int) -> int:
    """x / y, rounded up: triton.cdiv takes a microsecond."""
    return -(-x // y)


def power_of_two(at_least: int) -> int:
    """The smallest power of two that is not below ``at_least``."""
    return 1 << max(0, at_least - 1).bit_length()
