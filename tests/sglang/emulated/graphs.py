"""CUDA graphs: what is captured is recorded, and a replay runs it again, on the same tensors.

Recorded are the operations that PyTorch dispatches and the launches of interpreted kernels; nothing else runs in a
replay. As on a GPU, a capture computes nothing: what its operations wrote outside of the graph is put back, and
floating-point tensors made in it are NaN until a replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from tests.sglang.emulated.cuda import STREAM, CaptureError, always, on_device, put_on_device, state, tensors_in

aten = torch.ops.aten
HOST_READS = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
)
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
"""Those read the host, too, by a mask."""


class Recorder(TorchDispatchMode):
    """Hands what touches the device to the graph that is being captured."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (state.makes_on_device or any(map(on_device, tensors_in((*args, *kwargs.values()))))):
            return func(*args, **kwargs)
        by_mask = func in INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1])
        if func in HOST_READS or by_mask:
            raise CaptureError(f"{func}: not permitted while a stream is captured")
        return state.graph.run(func, args, kwargs, _written(func, args, kwargs))


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that ``func`` writes."""
    arguments = func._schema.arguments
    values = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    return tensors_in(values.get(argument.name) for argument in arguments if argument.is_write)


class CUDAGraph:
    replays = 0
    """Of all graphs of this process."""
    prefills = 0
    """Replays of SGLang's graphs of prefill, each of several graphs."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._steps: list[tuple[Callable[..., Any], Any, Any, list[Tensor | None]]] = []
        """What was called, with what, and the tensors that it made."""
        self._made: set[int] = set()
        self._before: dict[int, tuple[Any, Any]] = {}
        self._nested = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert state.graph is None
        state.graph, self._recorder = self, Recorder()
        self._recorder.__enter__()

    def capture_end(self) -> None:
        self._recorder.__exit__(None, None, None)
        state.graph = None
        with torch.inference_mode(), torch._C.DisableTorchFunction():
            for storage, content in self._before.values():
                storage.copy_(content)
            for *_, made in self._steps:
                for x in made:
                    if x is not None and x.is_floating_point() and x.itemsize > 1:
                        x.fill_(torch.nan)
        self._before.clear()

    def replay(self) -> None:
        assert state.graph is None
        CUDAGraph.replays += 1
        with torch.inference_mode(), torch._C.DisableTorchFunction():
            for func, args, kwargs, made in self._steps:
                for old, new in zip(made, tensors_in([func(*args, **kwargs)]), strict=True):
                    if old is not None:
                        old.copy_(new)

    def run(self, func: Callable[..., Any], args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        """Run ``func``, which writes the tensors ``written``, and record it."""
        if self._nested:  # what is recorded calls it
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            for x in written:
                self._keep(x)
            known = {_place(x) for x in tensors_in((*args, *kwargs.values()))}
            self._nested = True
            try:
                out = func(*args, **kwargs)
            finally:
                self._nested = False
            made = [None if _place(x) in known else x for x in tensors_in([out])]
            self._made |= {_place(x) for x in made if x is not None}
        if state.makes_on_device:
            put_on_device(made)
        self._steps.append((func, args, kwargs, made))
        return out

    def _keep(self, x: Tensor) -> None:
        place, storage = _place(x), x.untyped_storage()
        if place not in self._made and place not in self._before:
            self._before[place] = storage, storage.clone()

    def reset(self) -> None:
        self._steps.clear()

    pool = always((0, 1))
    instantiate = enable_debug_mode = always()


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Capture:
    """In place of ``torch.cuda.graph``."""

    def __init__(self, cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, **_: Any) -> None:
        self._graph = cuda_graph

    def __enter__(self) -> None:
        self._graph.capture_begin()

    def __exit__(self, *_: Any) -> None:
        self._graph.capture_end()


def _recorded(launch: Callable[..., None]) -> Callable[..., None]:
    """Launches of interpreted kernels, which read a tensor's memory whatever side it is on."""

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            if state.graph is None:
                return launch(self, *args, **kwargs)
            tensors = tensors_in(getattr(x, "base", x) for x in (*args, *kwargs.values()))
            return state.graph.run(lambda: launch(self, *args, **kwargs), (), {}, tensors)

    return call


def install() -> None:
    """Put the graphs in the place of PyTorch's."""
    for module in (torch.cuda, torch.cuda.graphs):
        module.CUDAGraph, module.graph, module.graph_pool_handle = CUDAGraph, Capture, always((0, 1))
    GridExecutor.__call__ = _recorded(GridExecutor.__call__)


def install_in_sglang() -> None:
    """Tell SGLang's graphs of prefill, which ask CUDA itself, what is captured."""
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import breakable_cuda_graph

    breakable_cuda_graph._is_stream_capturing = lambda stream: stream is STREAM and state.graph is not None
    replay = breakable_cuda_graph.BreakableCUDAGraph.replay

    def counted(self: Any) -> None:
        CUDAGraph.prefills += 1
        replay(self)

    breakable_cuda_graph.BreakableCUDAGraph.replay = counted
