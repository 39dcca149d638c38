from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from qnext_kernels import triton_launch
from qnext_kernels.triton_launch import launch
from tests.kernels.triton.ahead_of_time import Driver

Launched = tuple[Any, ...]
BF16, F32, INT = torch.bfloat16, torch.float32, torch.int32


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["index"])
def scale_kernel(x, index, y, stride, count, factor, BLOCK: tl.constexpr, TWICE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(index + at, mask=at < count, other=0)
    value = tl.load(x + place * stride, mask=at < count, other=0.0).to(tl.float32) * factor
    tl.store(y + at, value + value if TWICE else value, mask=at < count)


@triton.jit
def copy_kernel(x, y, tiles, count, SIZE: tl.constexpr, TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    value = tl.reshape(tiles.load([0, 0]), [SIZE]) if TILES else tl.load(x + at, mask=at < count, other=0.0)
    tl.store(y + at, value, mask=at < count)


def arguments(dtype: torch.dtype = BF16, index: torch.dtype = INT, offset: int = 0, stride: int = 16) -> list[Any]:
    """Those of :func:`scale_kernel`; x begins ``offset`` elements behind an aligned address."""
    return [torch.empty(256, dtype=dtype)[offset:], torch.empty(64, dtype=index), torch.empty(64), stride, 64, 0.5]


OPTIONS = {"BLOCK": 32, "TWICE": False, "num_warps": 1}
CASES: dict[str, tuple[tuple[int, ...], list[Any], dict[str, Any]]] = {
    "plain": ((2,), arguments(), OPTIONS),
    "another grid": ((1, 2), arguments(), OPTIONS),
    "another dtype": ((2,), arguments(F32), OPTIONS),
    "wider indices": ((2,), arguments(index=torch.int64), OPTIONS),
    "a misaligned address": ((2,), arguments(offset=1), OPTIONS),
    "an address aligned to half": ((2,), arguments(offset=4), OPTIONS),
    "stride 1": ((2,), arguments(stride=1), OPTIONS),
    "an odd stride": ((2,), arguments(stride=17), OPTIONS),
    "a stride of 64 bits": ((2,), arguments(stride=1 << 40), OPTIONS),
    "another constant": ((2,), arguments(), OPTIONS | {"TWICE": True}),
    "another option": ((2,), arguments(), OPTIONS | {"num_warps": 2}),
    "an option more": ((2,), arguments(), OPTIONS | {"enable_fp_fusion": False}),
}


class Recorder(Driver):
    """Compiles for sm_90, and writes down what would run there."""

    def __init__(self) -> None:
        super().__init__("sm_90")
        self.launched: list[Launched] = []
        self.utils.load_binary = lambda *_: (None, 1, 32, 0, 1024)
        self.launcher_cls = lambda source, metadata: lambda *launched: self.record(metadata.hash, launched)

    def record(self, compiled: str, launched: Launched) -> None:
        x, y, z, _, _, _, _, _, _, *kernel_arguments = launched
        values = (value.data_ptr() if isinstance(value, Tensor) else value for value in kernel_arguments)
        self.launched.append((compiled, (x, y, z), *values))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    driver, active = Recorder(), triton.runtime.driver._active
    monkeypatch.setattr(triton_launch, "_launches", {})
    triton.runtime.driver.set_active(driver)
    yield driver
    triton.runtime.driver._active = active
    for kernel in (scale_kernel, copy_kernel):
        kernel.device_caches.clear()


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every launch that goes through Triton."""
    run, seen = JITFunction.run, list[Any]()

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(self)
        return run(self, *args, **options)

    monkeypatch.setattr(JITFunction, "run", counted)
    return seen


def test_every_launch_is_the_one_that_triton_makes_whatever_was_launched_before(recorder: Recorder) -> None:
    expected = {}
    for name, (grid, given, options) in CASES.items():
        scale_kernel[grid](*given, **options)
        expected[name] = recorder.launched.pop()
    assert len({compiled for compiled, *_ in expected.values()}) == len(CASES) - 2  # a grid, half an alignment
    for names in (CASES, reversed(CASES), CASES):
        for name in names:
            grid, given, options = CASES[name]
            launch(scale_kernel, grid, *given, **options)
            assert recorder.launched.pop() == expected[name], name


def test_a_case_goes_through_triton_until_it_is_known(recorder: Recorder, lookups: list[Any]) -> None:
    grid, given, options = CASES["plain"]
    for _ in range(5):
        launch(scale_kernel, grid, *given, **options)
    assert len(lookups) == 2
    launch(scale_kernel, grid, *given[:4], 63, *given[5:], **options)
    assert len(lookups) == 3
    assert len(recorder.launched) == 6


def test_tensors_that_are_described_are_those_of_every_launch(recorder: Recorder, lookups: list[Any]) -> None:
    for _ in range(4):
        x, y = torch.empty(16, 16, dtype=BF16), torch.empty(256, dtype=BF16)
        tiles = TensorDescriptor(x, [16, 16], [16, 1], [16, 16])
        for described in (tiles, None):
            launch(copy_kernel, (1,), x, y, described, 256, SIZE=256, TILES=described is not None)
            _, _, *given = recorder.launched[-1]
            assert given == [x.data_ptr(), y.data_ptr(), described, 256, 256, described is not None]
    assert len(lookups) == 3


def test_other_memory_of_the_same_layout_is_the_same_case(recorder: Recorder, lookups: list[Any]) -> None:
    grid, _, options = CASES["plain"]
    others = [arguments() for _ in range(4)]
    for other in others:
        launch(scale_kernel, grid, *other, **options)
    assert len(lookups) == 2
    assert [launched[2] for launched in recorder.launched] == [other[0].data_ptr() for other in others]


def test_what_is_remembered_is_bounded(recorder: Recorder, lookups: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "MOST_REMEMBERED", 3)
    grid, given, options = CASES["plain"]
    for count in range(8):
        launch(scale_kernel, grid, *given[:4], count, *given[5:], **options)
        (own,) = triton_launch._launches.values()
        assert len(own.known) <= 3


def test_everything_goes_through_triton_on_amd(
    recorder: Recorder, lookups: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    grid, given, options = CASES["plain"]
    for _ in range(3):
        launch(scale_kernel, grid, *given, **options)
    assert len(lookups) == 3


@pytest.mark.parametrize("wrong", [lambda given: [*given[1:], given[0]], lambda given: [given[3], *given]])
def test_numbers_come_behind_tensors(wrong: Callable[[list[Any]], list[Any]]) -> None:
    with pytest.raises(AssertionError):
        triton_launch._counts(tuple(wrong(arguments())))
