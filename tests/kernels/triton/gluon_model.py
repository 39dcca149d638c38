"""A model of what a kernel in Gluon calls on Hopper, with which its own source runs on CPU tensors.

Modelled are pointers into the kernel's arguments and nowhere else; shared memory, NaN before it is written; barriers
with arrivals, bytes and phases; copies of tiles, with zeros for what lies outside; and products of a warpgroup, that
end as late as the waits allow. What is asynchronous must find what it reads unchanged when it ends, and nobody gets a
result before a wait that covers it. Partitions take turns: one runs until it has to wait, or has arrived at a barrier,
so that a tile is overwritten as early as it may be. Where all wait, the kernel hangs, which is an error.

Not modelled are layouts, the threads of a partition with their barriers and fences, registers and time. Products sum in
PyTorch's order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from tests.kernels.kernel_inputs import same_bits

OPTIONS = ("num_warps", "maxnreg")
"""Of a launch, which no kernel sees."""


class HangError(RuntimeError):
    """Every partition waits for another."""


class RaceError(RuntimeError):
    """Something is read or written while an operation is under way that needs it, or has not written it yet."""


class Pointers:
    """Addresses of elements of an argument."""

    def __init__(self, memory: Tensor, offsets: Tensor) -> None:
        self.memory, self.offsets = memory, offsets

    def __add__(self, more: Tensor | int) -> Pointers:
        return Pointers(self.memory, self.offsets + more)

    def at(self, mask: Tensor) -> Tensor:
        offsets = self.offsets[mask]
        if offsets.numel() and not 0 <= int(offsets.min()) <= int(offsets.max()) < self.memory.numel():
            raise IndexError("an address lies outside of the argument")
        return offsets


class Shared:
    """A tile, or several, in shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def index(self, i: Any) -> Shared:
        return Shared(self.data[int(i)])

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.data.narrow(0, start, length))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def load(self, layout: Any = None) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        expect_alike(self.data, value)
        self.data.copy_(value)


class Snapshot:
    """What an operation under way reads in shared memory."""

    def __init__(self, tile: Shared) -> None:
        self.tile, self.before = tile, tile.data.clone()

    def expect_unchanged(self, what: str) -> None:
        if not same_bits(self.tile.data, self.before):
            raise RaceError(f"{what} was overwritten before the operation that reads it has ended")


class Barrier:
    """Its phase ends when all have arrived and all expected bytes have come."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def take(self, arrived: int, expected: int) -> bool:
        """Whether this ends a phase: fewer bytes than none are expected where some have come."""
        self.pending, self.bytes = self.pending - arrived, self.bytes + expected
        if self.pending < 0:
            raise ValueError("more have arrived at a barrier than it counts")
        ends = self.pending == self.bytes == 0
        if ends:
            self.phase, self.pending = self.phase + 1, self.count
        return ends


class Barriers:
    def __init__(self, count: int) -> None:
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.barriers[int(i)]


class Tiles:
    """A tensor descriptor."""

    def __init__(self, descriptor: TensorDescriptor) -> None:
        self.data = torch.as_strided(descriptor.base, list(descriptor.shape), list(descriptor.strides))
        self.block = list(descriptor.block_shape)

    def inside(self, corner: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Of the tile there, what lies in the tensor: where in the tensor, and where in the tile."""
        in_tensor, in_tile = [], []
        for first, length, size in zip(map(int, corner), self.block, self.data.shape, strict=True):
            low, high = min(max(first, 0), size), max(min(first + length, size), 0)
            in_tensor.append(slice(low, max(low, high)))
            in_tile.append(slice(low - first, max(low, high) - first))
        return tuple(in_tensor), tuple(in_tile)


class Product:
    """One on its way; only a wait turns it into a tensor, and nothing but another product can be given it before."""

    def __init__(self, a: Tensor, b: Shared, acc: Tensor | Product | None) -> None:
        self.a, self.b, self.acc = a, Snapshot(b), acc
        self.result: Tensor | None = None

    def end(self) -> None:
        self.b.expect_unchanged("a second factor")
        before = self.acc.result if isinstance(self.acc, Product) else self.acc
        product = self.a.float() @ self.b.tile.data.float()
        self.result = product if before is None else before + product


class Turns:
    """Of the partitions of a program, of which one runs at a time."""

    def __init__(self, count: int) -> None:
        self.condition, self.running, self.phases = threading.Condition(), 0, 0
        self.ended, self.waits_since = [False] * count, [-1] * count
        self.errors: list[BaseException] = []
        self.me = threading.local()

    def run(self, parts: Sequence[tuple[Callable[..., None], Sequence[Any]]]) -> None:
        threads = [threading.Thread(target=self._run_one, args=(i, *part)) for i, part in enumerate(parts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def _run_one(self, number: int, function: Callable[..., None], arguments: Sequence[Any]) -> None:
        self.me.number = number
        self._take()
        try:
            function(*arguments)
        except BaseException as error:
            self.errors.append(error)
        self.ended[number] = True
        self.give()

    def _take(self) -> None:
        with self.condition:
            self.condition.wait_for(lambda: self.running == self.me.number)

    def give(self) -> None:
        """Let the next that has not ended run, and go on when it is this one's turn."""
        me, count = self.me.number, len(self.ended)
        others = [(me + i) % count for i in range(1, count) if not self.ended[(me + i) % count]]
        if not others:
            return
        with self.condition:
            self.running = others[0]
            self.condition.notify_all()
        if not self.ended[me]:
            self._take()

    def wait(self, over: Callable[[], bool]) -> None:
        while not over():
            self.waits_since[self.me.number] = self.phases
            if all(ended or since == self.phases for ended, since in zip(self.ended, self.waits_since, strict=True)):
                raise HangError("every partition waits for another")
            self.give()


class Program:
    """What one program has under way, and the functions of Gluon that begin it and wait for it."""

    def __init__(self) -> None:
        self.products: list[Product] = []
        self.stores: list[Snapshot] = []
        self.turns = Turns(1)

    def warpgroup_mma(
        self, a: Tensor, b: Shared, acc: Tensor | Product, *, use_acc: bool = True, is_async: bool = False
    ) -> Product:
        if not isinstance(a, Tensor) or not a.dtype == b.data.dtype == torch.bfloat16:
            raise TypeError("factors are bfloat16, the first in registers")
        if acc.shape != (a.shape[0], b.data.shape[1]) if isinstance(acc, Tensor) else acc.result is not None:
            raise ValueError("no accumulator of this product")
        product = Product(a, b, acc if use_acc else None)
        self.products.append(product)
        if not is_async:
            self.warpgroup_mma_wait(0, [product])
        return product

    def warpgroup_mma_wait(self, under_way: int, deps: Sequence[Product]) -> Any:
        while len(self.products) > under_way:
            self.products.pop(0).end()
        if any(product.result is None for product in deps):
            raise RaceError("a result is read before its product has ended")
        return deps[0].result if len(deps) == 1 else tuple(product.result for product in deps)

    def load_tile(self, tiles: Tiles, corner: Sequence[Any], barrier: Barrier, tile: Shared) -> None:
        in_tensor, in_tile = tiles.inside(corner)
        data = torch.zeros(tiles.block, dtype=tiles.data.dtype)
        data[in_tile] = tiles.data[in_tensor]
        tile.store(data)
        self.turns.phases += barrier.take(0, -data.nbytes)

    def store_tile(self, tiles: Tiles, corner: Sequence[Any], tile: Shared) -> None:
        in_tensor, in_tile = tiles.inside(corner)
        expect_alike(torch.empty(tiles.block, dtype=tiles.data.dtype), tile.data)
        self.stores.append(Snapshot(tile))
        tiles.data[in_tensor] = tile.data[in_tile]

    def store_wait(self, under_way: int) -> None:
        while len(self.stores) > under_way:
            self.stores.pop(0).expect_unchanged("a tile")

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    def expect(self, barrier: Barrier, count: int) -> None:
        self.turns.phases += barrier.take(1, count)

    def arrive(self, barrier: Barrier, count: int = 1) -> None:
        self.turns.phases += barrier.take(count, 0)
        self.turns.give()

    def wait(self, barrier: Barrier, parity: Any) -> None:
        """Until the phase of this parity has ended; at first the one before has, which is odd."""
        self.turns.wait(lambda: barrier.phase % 2 != int(parity))

    def warp_specialize(self, parts: Sequence[Any], warps: Sequence[int], registers: Sequence[int]) -> None:
        assert len(parts) == len(warps) + 1 == len(registers) + 1
        self.turns = Turns(len(parts))
        self.turns.run(parts)
        self.expect_idle()

    def expect_idle(self) -> None:
        if self.products or self.stores:
            raise RaceError("a program ended before what it had under way")


def expect_alike(a: Tensor, b: Tensor) -> None:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        raise TypeError(f"expected {list(a.shape)} {a.dtype}, got {list(b.shape)} {b.dtype}")


def load(pointers: Pointers, mask: Any = None, other: float = 0) -> Tensor:
    mask = torch.as_tensor(True if mask is None else mask).expand(pointers.offsets.shape)
    loaded = torch.full(pointers.offsets.shape, other, dtype=pointers.memory.dtype)
    loaded[mask] = pointers.memory[pointers.at(mask)]
    return loaded


def store(pointers: Pointers, value: Tensor, mask: Any = None) -> None:
    mask = torch.as_tensor(True if mask is None else mask).expand(pointers.offsets.shape)
    expect_alike(torch.empty(pointers.offsets.shape, dtype=pointers.memory.dtype), value)
    pointers.memory[pointers.at(mask)] = value[mask]


def where(condition: Any, a: Any, b: Any) -> Any:
    """Numbers take the dtype of the tensor beside them."""
    dtype = next((x.dtype for x in (a, b) if isinstance(x, Tensor)), torch.int32)
    return torch.where(torch.as_tensor(condition), torch.as_tensor(a, dtype=dtype), torch.as_tensor(b, dtype=dtype))


def allocate_shared_memory(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared | Barriers:
    """Barriers are what 64-bit integers in shared memory are for."""
    return Barriers(shape[0]) if dtype == torch.int64 else Shared(torch.full(shape, torch.nan, dtype=dtype))


def language(program: Program, number: int) -> SimpleNamespace:
    """``triton.experimental.gluon.language`` for one program of a grid."""
    layouts = dict.fromkeys(
        ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout"), lambda *sizes: None
    )
    return SimpleNamespace(
        **layouts,
        bfloat16=torch.bfloat16, float32=torch.float32, int32=torch.int32, int64=torch.int64,
        program_id=lambda axis: torch.tensor(number, dtype=torch.int32),
        arange=lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        convert_layout=lambda x, layout: x,
        # A move that hides from the compiler what it could compute once.
        inline_asm_elementwise=lambda asm, constraints, args, dtype, is_pure, pack: args[0].clone(),
        static_range=range,
        where=where, load=load, store=store, allocate_shared_memory=allocate_shared_memory,
        warp_specialize=program.warp_specialize,
    )  # fmt: skip


def argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        rest = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
        return Pointers(torch.as_strided(x, (rest,), (1,)), torch.tensor(0))
    return Tiles(x) if isinstance(x, TensorDescriptor) else torch.tensor(x, dtype=torch.int32)


@contextmanager
def modelled(module: ModuleType) -> Iterator[list[tuple[int, ...]]]:
    """Have what ``module`` launches run with the model, its functions as they are; give the grids it has launched.

    It must call what is asynchronous by the names that the walk of the gated delta rule gives it.
    """
    launched: list[tuple[int, ...]] = []
    with pytest.MonkeyPatch.context() as patch:

        def launch(kernel: Callable[..., None], grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
            constants = {name: value for name, value in constants.items() if name not in OPTIONS}
            given = [argument(x) for x in arguments]
            for number in range(*grid):
                program = Program()
                for name, value in functions(program, number).items():
                    patch.setattr(module, name, value)
                kernel(*given, **constants)
                program.expect_idle()
            launched.append(grid)

        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                patch.setattr(module, name, value.fn)
        patch.setattr(module, "launch", launch)
        yield launched


def functions(program: Program, number: int) -> dict[str, Any]:
    """What stands for the names that a module has imported from Gluon."""
    barriers = {name: getattr(program, name) for name in ("init", "expect", "arrive", "wait")}
    return {
        "gl": language(program, number),
        "mbarrier": SimpleNamespace(MBarrierLayout=mbarrier.MBarrierLayout, **barriers),
        "tma": SimpleNamespace(store_wait=program.store_wait),
        "load_tile": program.load_tile,
        "store_tile": program.store_tile,
        "warpgroup_mma": program.warpgroup_mma,
        "warpgroup_mma_wait": program.warpgroup_mma_wait,
        "barrier": lambda: None,
        "fence_async_shared": lambda: None,
    }
