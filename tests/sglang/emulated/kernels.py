"""What SGLang has in CUDA C++, as far as our model needs it, and the drivers that Triton and NVML ask.

Where SGLang also has a kernel in Triton, that one stands in. Any other CUDA kernel is an error with its name.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml
import torch
import torch.distributed
import triton
from torch import Tensor
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from tests.kernels.triton.interpreter import interpreted, kernel_modules
from tests.sglang.emulated.cuda import CAPABILITY, CUDA, MEMORY, NAME, Sides, always

COMPILED_PACKAGES = ("sgl_kernel", "flash_mla")


def is_arch_support_pdl() -> bool:
    return False


def weak_ref_tensor(x: Tensor) -> Tensor:
    return x


def store_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, slot_limit: int, skipped_slot: int
) -> None:
    kept = (slots != skipped_slot)[:, None]
    for new, cache in ((k, k_cache), (v, v_cache)):
        rows = cache.view(cache.shape[0], -1)
        rows[slots.long()] = torch.where(kept, new.reshape(new.shape[0], -1), rows[slots.long()])


def clamp_position(out: Tensor, seq_lens: Tensor) -> None:
    out.copy_((seq_lens - 1).clamp(min=0))


def build_tree_kernel_efficient(*arguments: Any) -> None:
    from sglang.kernels.ops.speculative.spec_tree import sgl_build_tree_kernel_triton

    sgl_build_tree_kernel_triton(*arguments)


def verify_tree_greedy(*arguments: Any) -> None:
    from sglang.kernels.ops.speculative.spec_tree import verify_tree_greedy_triton

    verify_tree_greedy_triton(*arguments)


class Kernel:
    """A kernel without a stand-in, which a function of this module is by its name, or something with kernels in it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(f"the CUDA kernel {self._name}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return globals().get(name) or Kernel(f"{self._name}.{name}")


class Compiled(ModuleType):
    """A module of one of the compiled packages."""

    def __getattr__(self, name: str) -> Any:
        return getattr(Kernel(self.__name__), name)


class CompiledPackages(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        ours = name.partition(".")[0] in COMPILED_PACKAGES
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: Any) -> ModuleType:
        return Compiled(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


class Driver:
    """Triton's, of an H200."""

    utils = SimpleNamespace(
        get_device_properties=always(
            {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
        )
    )
    get_current_target = always(GPUTarget("cuda", 90, 32))
    get_active_torch_device = always(CUDA)
    get_current_device = get_current_stream = always(0)
    get_benchmarker = always(always([1.0, 1.0, 1.0]))

    def get_device_interface(self) -> Any:
        return torch.cuda


@contextmanager
def interpreting(launched: set[str]) -> Iterator[None]:
    """Interpret kernels and note their names; ours are held to the memory of their arguments.

    SGLang's may not be: some find their tensors by the addresses that another one holds.
    """
    names = "create_masked_load", "create_masked_store"
    unchecked = {name: getattr(InterpreterBuilder, name) for name in names}
    with interpreted(*kernel_modules()):
        checked = {name: getattr(InterpreterBuilder, name) for name in names}
        launch = GridExecutor.__call__

        def call(self: Any, *args: Any, **kwargs: Any) -> None:
            ours = self.fn.__module__.startswith("qnext_")
            launched.add(self.fn.__name__)
            for name, function in (checked if ours else unchecked).items():
                setattr(InterpreterBuilder, name, function)
            launch(self, *args, **kwargs)

        GridExecutor.__call__ = call
        yield


def install() -> None:
    """Put all that into place, before SGLang is imported."""
    sys.meta_path.insert(0, CompiledPackages())
    triton.runtime.driver.set_active(Driver())
    backends["nvidia"].driver.is_active = staticmethod(always(True))
    for name, value in {
        "Init": None,
        "Shutdown": None,
        "DeviceGetCount": 1,
        "DeviceGetHandleByIndex": 0,
        "DeviceGetName": NAME,
        "DeviceGetCudaComputeCapability": CAPABILITY,
        "DeviceGetMemoryInfo": SimpleNamespace(total=MEMORY),
    }.items():
        setattr(pynvml, f"nvml{name}", always(value))
    for name in ("init_process_group", "new_group"):
        for module in (torch.distributed, torch.distributed.distributed_c10d):
            setattr(module, name, _on_gloo(getattr(module, name)))
    torch.library.Library.impl = _on_cpu(torch.library.Library.impl)
    import sglang.kernels.jit.utils as jit
    from sglang.kernels.jit.utils.compile import loader

    jit.load_jit = loader.load_jit = lambda *names, **_: Kernel(names[0])


def _on_gloo(make: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        kwargs.pop("device_id", None)
        return make(*args, **kwargs)

    return call


def _on_cpu(register: Callable[..., Any]) -> Callable[..., Any]:
    """What is registered for CUDA serves the CPU, where the device's tensors lie."""

    def call(self: Any, name: str, function: Any, dispatch_key: str = "", **options: Any) -> Any:
        if dispatch_key != "CUDA":
            return register(self, name, function, dispatch_key, **options)

        def on_device(*args: Any, **kwargs: Any) -> Any:
            with torch._C._EnableTorchFunction(), Sides():
                return function(*args, **kwargs)

        return register(self, name, on_device, "CPU", **options)

    return call
