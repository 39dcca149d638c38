from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qnext_kernels import layouts
from qnext_kernels.dispatch import deterministic, force_backend
from qnext_kernels.layouts import forget, once_per_layout


def on(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@pytest.fixture
def counted() -> tuple[Any, list[Any]]:
    """A function of two tensors and a number, and the arguments that it has run with."""
    seen: list[Any] = []

    @once_per_layout
    def function(x: Tensor, y: Tensor | None, number: int = 0) -> int:
        seen.append((x, y, number))
        if number < 0:
            raise ValueError("number")
        return len(x)

    return function, seen


def test_a_function_runs_once_for_each_layout(counted: tuple[Any, list[Any]]) -> None:
    function, seen = counted
    cases = [
        (on("meta", 2), on("meta", 3)),
        (on("meta", 3), on("meta", 3)),
        (on("meta", 2), on("meta", 3, dtype=torch.float16)),
        (on("meta", 2), on("meta", 3, 1)),
        (on("meta", 2), None),
        (on("meta", 2), on("meta", 3), 1),
    ]
    for count, case in enumerate(cases, start=1):
        for _ in range(3):
            assert function(*case) == len(case[0])
            assert function(*(torch.empty_like(x) if isinstance(x, Tensor) else x for x in case)) == len(case[0])
        assert len(seen) == count


def test_an_error_is_raised_every_time(counted: tuple[Any, list[Any]]) -> None:
    function, seen = counted
    for _ in range(2):
        with pytest.raises(ValueError, match="number"):
            function(on("meta", 2), None, -1)
    assert len(seen) == 2


def test_a_function_runs_again_where_backends_may_have_changed(counted: tuple[Any, list[Any]]) -> None:
    function, seen = counted
    x = on("meta", 2)
    function(x, None)
    forget()
    function(x, None)
    with force_backend("reference"):
        function(x, None)
    function(x, None)
    with deterministic():
        function(x, None)
        function(x, None)
    function(x, None)
    assert len(seen) == 6


def test_on_a_cpu_a_function_runs_every_time_for_values_count_there(counted: tuple[Any, list[Any]]) -> None:
    function, seen = counted
    for _ in range(3):
        function(on("cpu", 2), on("cpu", 2))
    assert len(seen) == 3


def test_a_compiled_function_runs_every_time_that_it_is_traced(counted: tuple[Any, list[Any]]) -> None:
    function, _ = counted
    compiled = torch.compile(lambda x: x * function(x, None), fullgraph=True, backend="eager", dynamic=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))


def test_all_tensors_lie_on_the_device_of_the_first(counted: tuple[Any, list[Any]]) -> None:
    function, seen = counted
    with pytest.raises(ValueError, match="y: expected a tensor on meta, got one on cpu"):
        function(on("meta", 2), on("cpu", 2))
    assert not seen


def test_what_is_remembered_is_bounded(counted: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    function, seen = counted
    monkeypatch.setattr(layouts, "MOST_KNOWN", 2)
    for size in (1, 2, 1, 2, 3, 1):
        function(on("meta", size), None)
    assert [len(x) for x, *_ in seen] == [1, 2, 3, 1]
