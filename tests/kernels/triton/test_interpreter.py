"""The interpreter computes what the tests of kernels take it to compute, and leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.runtime.jit import JITFunction

from tests.kernels.kernel_inputs import same_bits
from tests.kernels.triton.ahead_of_time import compiling_for
from tests.kernels.triton.interpreter import interpreted, shuffled_programs


@triton.jit
def cast_kernel(x, y, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(y + index, tl.load(x + index).to(y.dtype.element_ty))


@triton.jit
def dot_kernel(x, y, out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    index = tl.arange(0, SIZE)
    tile = index[:, None] * SIZE + index[None, :]
    product = tl.dot(tl.load(x + tile), tl.load(y + tile), input_precision=PRECISION, out_dtype=tl.float32)
    tl.store(out + tile, product)


@triton.jit
def double_kernel(x, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    value = tl.load(x + index)
    tl.store(x + index, value + value)


@triton.jit
def append_kernel(log, count):
    place = tl.load(count)
    tl.store(log + place, tl.program_id(0) * 10 + tl.program_id(1))
    tl.store(count, place + 1)


@triton.jit
def sum_kernel(x, out, SIZE: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, SIZE)), axis=0))


@pytest.fixture
def here() -> Iterator[None]:
    with interpreted(sys.modules[__name__]):
        yield


@pytest.mark.usefixtures("here")
def test_casts_round_to_nearest_even() -> None:
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32).nan_to_num(nan=1.0)
    x[:3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf")])
    y, back = torch.empty(4096, dtype=torch.bfloat16), torch.empty(4096)
    cast_kernel[(1,)](x, y, SIZE=4096)
    cast_kernel[(1,)](y, back, SIZE=4096)
    assert same_bits(y, x.bfloat16())
    assert same_bits(back, y.float())


@pytest.mark.usefixtures("here")
def test_products_have_the_precision_they_ask_for() -> None:
    x, y = torch.randn(2, 32, 32)
    truth = x.double() @ y.double()

    def error(x: Tensor, y: Tensor, precision: str) -> float:
        out = torch.empty(32, 32)
        dot_kernel[(1,)](x, y, out, SIZE=32, PRECISION=precision)
        return float((out - truth).abs().max())

    assert error(x, y, "ieee") < 1e-5
    assert 1e-4 < error(x, y, "tf32") < 1e-2
    assert 1e-3 < error(x.bfloat16(), y.bfloat16(), "ieee") < 1e-1


@pytest.mark.usefixtures("here")
def test_arithmetic_in_bfloat16_is_refused() -> None:
    x = torch.ones(16)
    double_kernel[(1,)](x, SIZE=16)
    assert (x == 2).all()
    with pytest.raises(InterpreterError, match="arithmetic in bfloat16"):
        double_kernel[(1,)](x.bfloat16(), SIZE=16)


@pytest.mark.usefixtures("here")
def test_a_lane_outside_of_the_arguments_is_an_error() -> None:
    with pytest.raises(InterpreterError, match="load: 1 of 16 lanes lie in no argument"):
        double_kernel[(1,)](torch.ones(15), SIZE=16)
    with pytest.raises(InterpreterError, match="store: 8 of 16 lanes lie in no argument"):
        cast_kernel[(1,)](torch.ones(16), torch.ones(8), SIZE=16)


@pytest.mark.usefixtures("here")
def test_shuffled_programs_all_run_once_in_another_order() -> None:
    orders = []
    for seed in (1, 2):
        log, count = torch.zeros(12, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with shuffled_programs(seed):
            append_kernel[(3, 4)](log, count)
        orders.append(log.tolist())
    in_order = [10 * x + y for x in range(3) for y in range(4)]
    assert orders[0] != orders[1] != in_order
    assert sorted(orders[0]) == sorted(orders[1]) == in_order


def test_kernels_compile_again_behind_the_block() -> None:
    with interpreted(sys.modules[__name__]):
        out = torch.empty(1)
        sum_kernel[(1,)](torch.ones(32), out, SIZE=32)
        assert out == 32
    assert isinstance(sum_kernel, JITFunction)
    with compiling_for("sm_90") as compiled:
        sum_kernel[(1,)](torch.ones(32, device="meta"), torch.empty(1, device="meta"), SIZE=32, enable_fp_fusion=True)
    assert [kernel.name for kernel in compiled] == ["sum_kernel"]
