"""The device: PyTorch reports it, and tells its tensors from those of the host, though all of them lie on the CPU.

The storage of a tensor on the device carries a mark. As on a real one, an operation gets tensors of one side only, a
copy to the other side is a copy, and NumPy does not see the device's memory.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
NAME, CAPABILITY, MEMORY = "NVIDIA H200", (9, 0), 4 << 30
PROPERTIES = SimpleNamespace(
    name=NAME,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=MEMORY,
    multi_processor_count=132,
    shared_memory_per_block_optin=232448,
    warp_size=32,
    is_integrated=False,
)
COPIES = ("to", "cuda", "cpu", "type_as", "pin_memory")
EITHER_SIDE = ("copy_", "__getitem__", "__setitem__", "index_put_", "__set__", "set_", "is_pinned")
"""May get tensors of both sides."""


class CaptureError(RuntimeError):
    """What CUDA does not permit while a stream is captured."""


class State(threading.local):
    """Of a thread."""

    graph: Any = None
    """Which is being captured."""
    makes_on_device = False
    """Whether the operation that runs makes its tensors on the device."""


state = State()
_real_device = torch._C.TensorBase.device.__get__


def on_device(x: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return x.layout is torch.strided and getattr(x.untyped_storage(), "on_device", False)


def put_on_device(out: Any) -> None:
    """Mark the tensors of ``out``."""
    with torch._C.DisableTorchFunction():
        for x in tensors_in([out]):
            if _real_device(x) == CPU:
                x.untyped_storage().on_device = True


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among ``values`` and in their lists and tuples."""
    found: list[Tensor] = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += tensors_in(x)
    return found


class Sides(TorchFunctionMode):
    """Runs every function of PyTorch on the CPU, and keeps the marks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name == "__get__" or func is torch.device:
            return func(*args, **kwargs)
        if name in COPIES:
            return _copied(func, name, *args, **kwargs)
        inputs = tensors_in((*args, *kwargs.values()))
        sides = [on_device(x) for x in inputs]
        if name == "is_pinned":
            return not sides[0]
        _check(name, inputs, sides)
        target = sides[0] if name == "copy_" else any(sides)
        if kwargs.get("device") is not None:
            target, kwargs["device"] = _is_device(kwargs["device"]), CPU
        if name == "copy_" and sides[0] != sides[-1] and not (kwargs.get("non_blocking") or args[2:] == (True,)):
            _refuse_in_capture("copy_ from the other side, waited for")
        kwargs.pop("pin_memory", None)
        with _making(on_device=target):
            out = func(*args, **kwargs)
        if target:
            put_on_device(out)
        return out


def _copied(func: Any, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A tensor in another place or dtype; ``x`` itself where neither is another."""
    if name == "pin_memory":
        return x
    here = target = on_device(x)
    given = list(args)
    if name in ("cuda", "cpu"):
        target = name == "cuda"
    for place, value in enumerate(given):
        if isinstance(value, Tensor):
            target = on_device(value)
        elif isinstance(value, (str, torch.device)) or type(value) is int:
            target, given[place] = _is_device(value), CPU
    if kwargs.get("device") is not None:
        target, kwargs["device"] = _is_device(kwargs["device"]), CPU
    if target != here and not (kwargs.get("non_blocking") or any(value is True for value in given)):
        _refuse_in_capture(f"{name} to the other side, waited for")
    with _making(on_device=target):
        out = x if name in ("cuda", "cpu") else func(x, *given, **kwargs)
        if target != here and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            out = out.clone()
    if target:
        put_on_device(out)
    return out


def _is_device(x: Any) -> bool:
    return torch.device(x).type == "cuda" if isinstance(x, str) else type(x) is int or x.type == "cuda"


@contextlib.contextmanager
def _making(*, on_device: bool) -> Iterator[None]:
    before, state.makes_on_device = state.makes_on_device, on_device
    try:
        yield
    finally:
        state.makes_on_device = before


def _check(name: str, inputs: list[Tensor], sides: list[bool]) -> None:
    if not any(sides):
        return
    if name == "numpy":
        raise TypeError("can't convert a tensor on cuda:0 to numpy")
    if name == "tolist":
        _refuse_in_capture(name)
    if name not in EITHER_SIDE and any(x.dim() and not side for x, side in zip(inputs, sides, strict=True)):
        raise RuntimeError(f"{name}: expected all tensors on the same device, found cpu and cuda:0")


def _refuse_in_capture(what: str) -> None:
    if state.graph is not None:
        raise CaptureError(f"{what}: not permitted while a stream is captured")


def always(value: Any = None) -> Callable[..., Any]:
    """A function that gives ``value`` whatever it gets."""
    return lambda *_, **__: value


class Event:
    """Has happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    record = wait = synchronize = always()
    query = always(True)
    elapsed_time = always(1.0)


class Stream:
    """Has done whatever was launched on it."""

    made = 0
    device, device_index, device_type = CUDA, 0, 1

    def __init__(self, *_: Any, **__: Any) -> None:
        Stream.made += 1
        self.cuda_stream = self.stream_id = Stream.made

    wait_stream = wait_event = synchronize = always()
    query = always(True)
    record_event = always(Event())
    __enter__ = lambda self: self  # noqa: E731
    __exit__ = always()


STREAM = Stream()


def install() -> None:
    """Put the device into PyTorch, in this process and all of its threads."""
    x: Any = torch.Tensor
    x.device = property(lambda x: CUDA if on_device(x) else _real_device(x))
    x.is_cuda, x.is_cpu = property(on_device), property(lambda x: not on_device(x))
    x.get_device, x.record_stream = (lambda x: 0 if on_device(x) else -1), always()
    cuda: Any = torch.cuda
    for name in ("is_available", "_is_compiled", "is_initialized", "is_bf16_supported"):
        setattr(cuda, name, always(True))
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "current_device"):
        setattr(cuda, name, always(0))
    for name in ("_exchange_device", "_maybe_exchange_device"):
        setattr(cuda, name, always(0))
    for name in ("init", "_lazy_init", "empty_cache", "ipc_collect", "reset_peak_memory_stats", "synchronize"):
        setattr(cuda, name, always())
    for name in ("set_device", "set_stream", "manual_seed", "manual_seed_all"):
        setattr(cuda, name, always())
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, always(STREAM))
    for name in ("stream", "StreamContext", "device"):
        setattr(cuda, name, always(contextlib.nullcontext(STREAM)))
    cuda.device_count, cuda.get_device_name, cuda.get_device_capability = always(1), always(NAME), always(CAPABILITY)
    cuda.get_device_properties, cuda.get_arch_list = always(PROPERTIES), always(["sm_90"])
    cuda.mem_get_info = always((MEMORY - (MEMORY >> 3), MEMORY))
    cuda.Stream, cuda.Event, cuda.is_current_stream_capturing = Stream, Event, lambda: state.graph is not None
    accelerator: Any = torch.accelerator
    accelerator.is_available, accelerator.device_count = always(True), always(1)
    accelerator.current_accelerator, accelerator.current_device_index = always(torch.device("cuda")), always(0)
    accelerator.synchronize, torch.get_device_module = always(), always(cuda)
    begin = threading.Thread._bootstrap_inner

    def bootstrap(thread: threading.Thread) -> None:
        with Sides():
            begin(thread)

    threading.Thread._bootstrap_inner = bootstrap
    Sides().__enter__()
