"""Linear layers over weights in block-wise FP8."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qnext_kernels import force_backend, linear, pack_weight_, unpack_weight_
from qnext_kernels.fp8 import FP8, dequantize_blocks
from tests.kernels.fp8_inputs import all_codes, quantize_blocks
from tests.kernels.kernel_inputs import DTYPES, NATIVE_BACKENDS, Bad, assert_close, same_bits


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def weight_of(rows: int, k: int) -> tuple[Tensor, Tensor]:
    weight, scale = quantize_blocks(torch.randn(rows, k))
    # Blocks that differ by more than their numbers: a scale of another block would be seen.
    return weight, scale * torch.logspace(-1, 1, scale.numel()).view(scale.shape)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
# Below, at and above blocks of rows and columns, panels, and tokens that meet a panel at once and in several tiles.
@pytest.mark.parametrize(
    ("tokens", "rows", "k"),
    [
        (0, 5, 8),
        (1, 1, 1),
        (1, 127, 129),
        (2, 128, 128),
        (3, 129, 127),
        (5, 320, 513),
        (6, 64, 256),
        (7, 63, 130),
        (13, 192, 40),
        (49, 130, 528),
        (310, 70, 300),
        (4, 0, 8),
        (3, 5, 0),
    ],
)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_linear_in_fp8_agrees_with_float64(
    backend: str, tokens: int, rows: int, k: int, dtype: torch.dtype, bias: bool
) -> None:
    x, (weight, scale) = torch.randn(tokens, k, dtype=dtype), weight_of(rows, k)
    shift = torch.randn(rows, dtype=dtype) if bias else None
    with force_backend(backend):
        out = linear(x, weight, shift, scale=scale)
    assert out.dtype == dtype
    truth = F.linear(x.double(), dequantize_blocks(weight, scale, torch.float64), None if not bias else shift.double())
    assert_close(out, truth, {torch.float32: k + 2})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_reads_every_number_of_e4m3_exactly(dtype: torch.dtype, packed: bool) -> None:
    weight, scale = all_codes(150, 254), torch.ones(2, 2)
    expected = weight.float()
    assert len(expected.unique()) == 253  # zeros are equal
    with force_backend("native"):
        assert not packed or pack_weight_(weight)
        # Products with one and zeros have no rounding; bfloat16 has all numbers of e4m3.
        out = linear(torch.eye(254, dtype=dtype), weight, None, packed, scale)
    assert torch.equal(out.T.float(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_row_in_fp8_does_not_depend_on_the_batch_or_on_threads(dtype: torch.dtype) -> None:
    x, (weight, scale) = torch.randn(500, 1040, dtype=dtype), weight_of(137, 1040)
    with force_backend("native"):
        together = linear(x, weight, scale=scale)
        for some in (slice(0, 1), slice(3, 5), slice(7, 13), slice(20, 27), slice(40, 53), slice(100, 160)):
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                assert same_bits(linear(x[some], weight, scale=scale), together[some])


# Below, at and above a panel of 64 rows, and blocks.
@pytest.mark.parametrize(("rows", "k"), [(63, 8), (64, 6), (65, 1030), (200, 526)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weight_in_fp8_gives_the_bits_of_the_plain_one(dtype: torch.dtype, rows: int, k: int) -> None:
    (weight, scale), bias = weight_of(rows, k), torch.randn(rows, dtype=dtype)
    packed = weight.clone()
    with force_backend("native"):
        assert pack_weight_(packed)
        assert same_bits(packed, weight) == (rows < 64)
        for tokens in (0, 1, 3, 4, 7, 13, 300):
            x = torch.randn(tokens, k, dtype=dtype)
            out = linear(x, packed, bias, packed=True, scale=scale)
            assert same_bits(out, linear(x, weight, bias, scale=scale))
        unpack_weight_(packed)
    assert same_bits(packed, weight)


def test_matrices_in_fp8_are_packed_each_for_itself() -> None:
    weights, scale = quantize_blocks(torch.randn(3, 70, 16))
    packed = weights.clone()
    with force_backend("native"):
        assert pack_weight_(packed)
        x = torch.randn(2, 16)
        for n in range(3):
            out = linear(x, packed[n], packed=True, scale=scale[n])
            assert same_bits(out, linear(x, weights[n], scale=scale[n]))


def test_weight_in_fp8_that_cannot_be_packed_stays_as_it_is() -> None:
    odd, view = weight_of(64, 7)[0], weight_of(64, 16)[0][:, ::2]
    for weight in (odd, view):
        before = weight.clone()
        with force_backend("native"):
            assert not pack_weight_(weight)
        assert same_bits(weight, before)
    with force_backend("cpu"):
        assert not pack_weight_(weight_of(64, 8)[0])


def test_views_in_fp8_give_what_contiguous_tensors_do() -> None:
    (weight, scale), x = weight_of(200, 256), torch.randn(5, 2, 256)
    with force_backend("native"):
        out = linear(x[:, 1, ::2], weight[:, ::2], scale=scale[:, ::2])
        assert same_bits(
            out, linear(x[:, 1, ::2].contiguous(), weight[:, ::2].contiguous(), scale=scale[:, :1].clone())
        )


def test_torch_compile_keeps_a_linear_in_fp8() -> None:
    x, (weight, scale) = torch.randn(3, 64), weight_of(70, 64)
    torch._dynamo.reset()
    with force_backend("native"):
        compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
        assert same_bits(compiled(x, weight, None, False, scale), linear(x, weight, None, False, scale))


@pytest.mark.parametrize(
    "bad",
    [
        Bad("weight", "in bfloat16", lambda x: x.bfloat16(), TypeError),
        Bad("weight", "of fewer columns", lambda x: x[:, :-1], ValueError),
        Bad("scale", "of fewer blocks", lambda x: x[:, :-1], ValueError),
        Bad("scale", "in bfloat16", lambda x: x.bfloat16(), TypeError),
    ],
    ids=str,
)
def test_linear_in_fp8_refuses_bad_input_by_name(bad: Bad) -> None:
    weight, scale = weight_of(130, 200)
    arguments = {"x": torch.randn(2, 200), "weight": weight, "scale": scale}
    with pytest.raises(bad.error, match=f"^{bad.argument}:"):
        linear(**(arguments | {bad.argument: bad.change(arguments[bad.argument])}))


def test_weight_in_fp8_without_a_scale_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^weight: expected torch.float32, got torch.float8_e4m3fn"):
        linear(torch.randn(2, 8), torch.ones(4, 8).to(FP8))
