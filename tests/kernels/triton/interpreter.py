"""Triton's interpreter with the arithmetic of a GPU, inside a ``with`` block and without an environment variable.

As it comes, the interpreter cuts bits off to round to bfloat16, adds bfloat16 as the integers that store them, and
gives a comparison the dtype of what it compares. Here casts round to nearest even, products in tf32 round their
factors, a comparison is a bool, and other arithmetic in bfloat16 or e4m3 is an error (kernels compute in float32).
Casts to e4m3 round as a GPU does. Every lane of a load or store must lie in one of the kernel's arguments.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction

import qnext_kernels
from qnext_kernels import OPERATIONS, layouts

Array = NDArray[Any]
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def float32_of(bits: Array) -> Array:
    """The values of bfloat16 numbers that are stored as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bfloat16_of(x: Array) -> Array:
    """Float32 rounded to the nearest bfloat16, ties to even, as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def float32_of_e4m3(bits: Array) -> Array:
    """The values of e4m3 numbers that are stored as uint8."""
    return torch.from_numpy(np.array(bits, np.uint8)).view(torch.float8_e4m3fn).float().numpy()


def e4m3_of(x: Array) -> Array:
    """Float32 rounded to the nearest e4m3, ties to even, as uint8; what is beyond the largest becomes that."""
    values = torch.from_numpy(np.array(x, np.float32)).clamp(-448, 448)
    return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def tf32_of(x: Array) -> Array:
    """Float32 rounded to ten bits of mantissa, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32)


def kernel_modules() -> list[ModuleType]:
    """Every module with Triton kernels, imported."""
    names = [module.name for module in pkgutil.walk_packages(qnext_kernels.__path__, "qnext_kernels.")]
    return [importlib.import_module(name) for name in names if name.rpartition(".")[2].startswith("triton_")]


def operations_on_triton() -> list[str]:
    """The operations that have a Triton backend."""
    return [name for name, it in OPERATIONS.items() if "triton" in (backend.name for backend in it.backends)]


@contextmanager
def interpreted(*modules: ModuleType) -> Iterator[None]:
    """Run the kernels of ``modules`` on CPU tensors. What the interpreter changes in Triton is put back afterwards."""
    namespaces = [tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base, tl.condition]
    namespaces += [stock, stock.InterpreterBuilder, stock.GridExecutor, *modules]
    with ExitStack() as stack:
        for namespace in namespaces:
            stack.callback(_restore, namespace, dict(vars(namespace)))
        stack.callback(stock.InterpretedFunction.rewritten_fn.clear)
        stack.enter_context(triton.knobs.runtime.scope())
        stack.callback(layouts.forget)
        layouts.forget()
        triton.knobs.runtime.interpret = True
        functions: dict[int, stock.InterpretedFunction[Any]] = {}
        for namespace in (tl, tl.standard, *modules):
            for name, value in list(vars(namespace).items()):
                if isinstance(value, JITFunction):
                    setattr(namespace, name, functions.setdefault(id(value), stock.InterpretedFunction(value.fn)))
        _patch_once()
        _correct_arithmetic(stock.InterpreterBuilder)
        _check_memory(stock.InterpreterBuilder)
        yield


PLACES = ("interpreted", pytest.param("gpu", marks=pytest.mark.gpu))
"""Where :func:`kernels_run`, as parameters of a fixture."""


@contextmanager
def kernels_run(place: str) -> Iterator[None]:
    """Have kernels interpreted, or run on the GPU, where tensors are made by default then. Fresh memory is NaN."""
    with ExitStack() as stack:
        if place == "gpu":
            if not torch.cuda.is_available():
                pytest.skip("PyTorch finds no GPU")
            stack.enter_context(torch.device("cuda"))
        else:
            stack.enter_context(interpreted(*kernel_modules()))
        # What the references call has no deterministic form on a GPU, where it is only warned of.
        torch.use_deterministic_algorithms(True, warn_only=place == "gpu")
        stack.callback(torch.use_deterministic_algorithms, False)
        yield


@contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Run the programs of every launch in a random order; a GPU runs them in its own."""
    if not triton.knobs.runtime.interpret:
        yield
        return
    builder = stock.InterpreterBuilder
    before = dict(vars(builder))
    set_index, set_size, order = builder.set_grid_idx, builder.set_grid_dim, []

    def set_grid_dim(self: Any, x: int, y: int, z: int) -> None:
        set_size(self, x, y, z)
        order[:] = np.ndindex(x, y, z)
        random.Random(seed).shuffle(order)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        _, height, depth = self.grid_dim
        set_index(self, *order[(x * height + y) * depth + z])

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    try:
        yield
    finally:
        _restore(builder, before)


def _restore(namespace: Any, before: dict[str, Any]) -> None:
    for name in vars(namespace).keys() - before.keys():
        delattr(namespace, name)
    for name, value in before.items():
        if vars(namespace)[name] is not value:
            setattr(namespace, name, value)


def _patch_once() -> None:
    """Patch the language once for each module of functions instead of at every call, which takes most of the time."""
    patch, seen = stock._patch_lang, set()

    def patch_lang(function: Callable[..., Any]) -> SimpleNamespace:
        namespace = id(function.__globals__)
        if namespace not in seen:
            seen.add(namespace)
            patch(function)
        return SimpleNamespace(restore=lambda: None)

    stock._patch_lang = patch_lang


def _correct_arithmetic(builder: Any) -> None:
    cast, binary, unary, ternary = builder.cast_impl, builder.binary_op, builder.unary_op, builder.ternary_op

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if not {tl.bfloat16, tl.float8e4nv} & {source.dtype.scalar, to.scalar}:
            return cast(self, source, to)
        values = _values(source)
        round_to = {tl.bfloat16: bfloat16_of, tl.float8e4nv: e4m3_of}.get(to.scalar)
        data = values.astype(stock._get_np_dtype(to.scalar)) if round_to is None else round_to(values)
        return stock.TensorHandle(data, to.scalar)

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding_mode: Any) -> Any:
        return cast_impl(self, source, to)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: int) -> Any:
        x, y = _values(a), _values(b)
        if a.dtype.scalar == tl.float32 and input_precision.name == "TF32":
            x, y = tf32_of(x), tf32_of(y)
        return stock.TensorHandle(np.matmul(x, y) + d.data, d.dtype.scalar)

    def refuse(*handles: Any) -> None:
        for handle in handles:
            if handle.dtype.scalar in (tl.bfloat16, tl.float8e4nv):
                name = {tl.bfloat16: "bfloat16", tl.float8e4nv: "e4m3"}[handle.dtype.scalar]
                raise NotImplementedError(f"arithmetic in {name}")

    def binary_op(self: Any, x: Any, y: Any, op: Any) -> Any:
        refuse(x, y)
        result = binary(self, x, y, op)
        return stock.TensorHandle(result.data, tl.int1) if op in COMPARISONS else result

    def unary_op(self: Any, x: Any, op: Any) -> Any:
        refuse(x)
        return unary(self, x, op)

    def ternary_op(self: Any, x: Any, y: Any, z: Any, op: Any) -> Any:
        if op is not np.where:
            refuse(x, y, z)
        return ternary(self, x, y, z, op)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    builder.binary_op, builder.unary_op, builder.ternary_op = binary_op, unary_op, ternary_op


def _values(handle: Any) -> Array:
    if handle.dtype.scalar == tl.bfloat16:
        return float32_of(handle.data)
    return float32_of_e4m3(handle.data) if handle.dtype.scalar == tl.float8e4nv else handle.data.astype(np.float32)


def _check_memory(builder: Any) -> None:
    storages: list[tuple[int, int]] = []
    take_arguments = stock.GridExecutor._init_args_hst
    load, store = builder.create_masked_load, builder.create_masked_store

    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        taken = take_arguments(self, args, kwargs)
        # Of a tensor descriptor, the tensor.
        arguments = (getattr(x, "base", x) for x in (*taken[0], *taken[1].values()))
        tensors = [x for x in arguments if hasattr(x, "untyped_storage")]
        memory = [tensor.untyped_storage() for tensor in tensors]
        storages[:] = {(m.data_ptr(), m.data_ptr() + m.nbytes()) for m in memory}
        return taken

    def check(pointers: Any, mask: Any, what: str) -> None:
        address, used = np.broadcast_arrays(pointers.data, mask.data)
        address = address[used]
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        inside = np.zeros(address.shape, bool)
        for begin, end in storages:
            inside |= (address >= begin) & (address + size <= end)
        if not inside.all():
            raise IndexError(f"{what}: {(~inside).sum()} of {inside.size} lanes lie in no argument")

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check(pointers, mask, "load")
        return load(self, pointers, mask, *rest, **options)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check(pointers, mask, "store")
        return store(self, pointers, value, mask, *rest, **options)

    stock.GridExecutor._init_args_hst = init_args
    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
