"""The model of Hopper computes what Gluon does, and fails where a GPU would be wrong or hang."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qnext_kernels.gated_delta_rule import CHUNK_SIZE, gluon_walk
from tests.kernels.kernel_inputs import start_offsets
from tests.kernels.triton.gluon_model import (
    Barriers,
    HangError,
    Pointers,
    Program,
    RaceError,
    Shared,
    Tiles,
    load,
    modelled,
    store,
)


def factors() -> tuple[Tensor, Shared, Tensor]:
    a, b = torch.randn(2, 64, 64).bfloat16()
    return a, Shared(b), torch.randn(64, 64)


def tiles(x: Tensor, *block: int) -> Tiles:
    return Tiles(TensorDescriptor(x, [*x.shape], [*x.stride()], [*block], gluon_walk.SWIZZLED))


def barriers(program: Program, count: int) -> Barriers:
    made = Barriers(count)
    for n in range(count):
        program.init(made.index(n), count=1)
    return made


def run(program: Program, *parts: Callable[[], None]) -> None:
    program.warp_specialize([(part, ()) for part in parts], [1] * (len(parts) - 1), [24] * (len(parts) - 1))


def test_products_add_up_and_end_in_their_order() -> None:
    program, (a, b, acc) = Program(), factors()
    one = program.warpgroup_mma(a, b, acc, is_async=True)
    two = program.warpgroup_mma(a, b, one, is_async=True)
    three = program.warpgroup_mma(a, b, acc, use_acc=False, is_async=True)
    product = a.float() @ b.data.float()
    assert torch.equal(program.warpgroup_mma_wait(2, deps=[one]), acc + product)
    two, three = program.warpgroup_mma_wait(0, deps=[two, three])
    assert torch.equal(two, acc + product + product)
    assert torch.equal(three, product)
    program.expect_idle()


def test_a_result_that_is_read_before_its_wait_is_an_error() -> None:
    program, (a, b, acc) = Program(), factors()
    program.warpgroup_mma(a, b, acc, is_async=True)
    product: Any = program.warpgroup_mma(a, b, acc, is_async=True)
    with pytest.raises(TypeError):
        product * 2.0
    with pytest.raises(TypeError):
        program.warpgroup_mma(product, b, acc, is_async=True)
    with pytest.raises(RaceError, match="read before"):
        program.warpgroup_mma_wait(1, deps=[product])
    with pytest.raises(RaceError, match="under way"):
        program.expect_idle()


def test_a_second_factor_that_is_overwritten_is_an_error() -> None:
    program, (a, b, acc) = Program(), factors()
    product = program.warpgroup_mma(a, b, acc, is_async=True)
    b.store(torch.zeros_like(b.data))
    with pytest.raises(RaceError, match="a second factor was overwritten"):
        program.warpgroup_mma_wait(0, deps=[product])


def test_a_tile_that_is_overwritten_while_it_is_stored_is_an_error() -> None:
    program, tile, out = Program(), Shared(torch.ones(16, 64).bfloat16()), torch.zeros(40, 64).bfloat16()
    program.store_tile(tiles(out, 16, 64), [0, 0], tile)
    program.store_wait(0)
    program.store_tile(tiles(out, 16, 64), [32, 0], tile)
    tile.store(torch.zeros_like(tile.data))
    with pytest.raises(RaceError, match="a tile was overwritten"):
        program.store_wait(0)
    assert out[:, 0].tolist() == [1.0] * 16 + [0.0] * 16 + [1.0] * 8


def test_what_lies_outside_is_loaded_as_zeros() -> None:
    program, x, tile = Program(), torch.ones(40, 64).bfloat16(), Shared(torch.zeros(16, 64).bfloat16())
    (bar,) = barriers(program, 1).barriers
    for row, rows in ((32, 8), (64, 0), (-4, 12)):
        program.expect(bar, 16 * 64 * 2)
        program.load_tile(tiles(x, 16, 64), [row, 0], bar, tile)
        assert tile.data.sum() == 64 * rows


def test_a_barrier_ends_a_phase_when_all_have_arrived_and_all_bytes_have_come() -> None:
    program, tile, seen = Program(), Shared(torch.zeros(16, 64).bfloat16()), []
    bars = barriers(program, 2)
    ready, consumed = bars.index(0), bars.index(1)

    def consume() -> None:
        for c in range(3):
            program.wait(ready, c & 1)
            seen.append(float(tile.data[0, 0]))
            program.arrive(consumed)

    def produce() -> None:
        for c in range(3):
            program.wait(consumed, (c & 1) ^ 1)
            program.expect(ready, 16 * 64 * 2)
            program.load_tile(tiles(torch.full((16, 64), float(c)).bfloat16(), 16, 64), [0, 0], ready, tile)

    run(program, consume, produce)
    assert seen == [0.0, 1.0, 2.0]
    assert (ready.phase, consumed.phase) == (3, 3)


def test_partitions_that_wait_for_each_other_are_an_error() -> None:
    program = Program()
    bars = barriers(program, 2)
    with pytest.raises(HangError):
        run(program, lambda: program.wait(bars.index(0), 0), lambda: program.wait(bars.index(1), 0))
    with pytest.raises(HangError):
        run(program, lambda: program.wait(bars.index(0), 0), lambda: None)


def test_an_error_of_a_partition_is_one_of_the_program() -> None:
    def fail() -> None:
        raise ArithmeticError

    program = Program()
    bars = barriers(program, 1)
    with pytest.raises(ArithmeticError):
        run(program, lambda: program.wait(bars.index(0), 0), fail)


def test_an_address_outside_of_an_argument_is_an_error() -> None:
    x = torch.arange(8.0)
    pointers = Pointers(x, torch.arange(4)) + 6
    inside = torch.tensor([True, True, False, False])
    assert load(pointers, inside, other=-1.0).tolist() == [6.0, 7.0, -1.0, -1.0]
    store(pointers, torch.zeros(4), inside)
    assert x[6:].tolist() == [0.0, 0.0]
    with pytest.raises(IndexError):
        load(pointers)
    with pytest.raises(IndexError):
        store(pointers, torch.zeros(4))
    with pytest.raises(TypeError):
        store(pointers, torch.zeros(4).bfloat16(), inside)


def walk_through(lengths: Sequence[int]) -> None:
    count, chunks = sum(lengths), sum(lengths) // CHUNK_SIZE + len(lengths)
    q, k, v, out = torch.randn(4, count, 1, gluon_walk.DIM).bfloat16()
    solve, attend = torch.randn(2, chunks * CHUNK_SIZE, CHUNK_SIZE).bfloat16() / CHUNK_SIZE
    parts = solve, attend, torch.rand(chunks, 3, CHUNK_SIZE), torch.rand(chunks)
    state, known = torch.randn(len(lengths), 1, gluon_walk.DIM, gluon_walk.DIM), torch.tensor([True] * len(lengths))
    batch = torch.arange(len(lengths)), start_offsets(lengths), known
    gluon_walk.run_gluon_walk((q, k, v), out, state, *batch, None, parts)


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(
    ("function", "line", "instead"),
    [
        ("load_tiles", "mbarrier.wait(consumed.index(stage), ((c // STAGES) & 1) ^ 1)", "pass"),
        ("load_tiles", "mbarrier.expect(bar, BYTES)", "mbarrier.expect(bar, BYTES + 2)"),
        ("begin", "mbarrier.wait(ready.index(stage), (c // STAGES) & 1)", "pass"),
        ("begin", "warpgroup_mma_wait(1, deps=[predicted])", "warpgroup_mma_wait(2, deps=[predicted])"),
        ("begin", "warpgroup_mma_wait(HALVES - 1, deps=[new])", "warpgroup_mma_wait(HALVES, deps=[new])"),
        ("finish", "warpgroup_mma_wait(HALVES, deps=[S])", "warpgroup_mma_wait(HALVES + 1, deps=[S])"),
        ("store_outputs", "tma.store_wait(0)", "pass"),
        ("store_outputs", "mbarrier.arrive(consumed.index(c % STAGES), count=1)", "pass"),
        ("store_outputs", "consumed.index(c % STAGES)", "consumed.index((c + 1) % STAGES)"),
        ("walk", "tma.store_wait(0)", "pass"),
    ],
)
def test_a_walk_that_waits_for_less_is_an_error(halves: int, function: str, line: str, instead: str) -> None:
    lengths = [5 * CHUNK_SIZE + 7, CHUNK_SIZE]
    with modelled(gluon_walk), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gluon_walk, "HALVES", halves)
        walk_through(lengths)
        source = inspect.getsource(getattr(gluon_walk, function))
        assert source.count(line) == 1
        names: dict[str, Any] = {}
        exec(source[source.index("def ") :].replace(line, instead), vars(gluon_walk), names)
        patch.setattr(gluon_walk, function, names[function])
        with pytest.raises((RaceError, HangError)):
            walk_through(lengths)
