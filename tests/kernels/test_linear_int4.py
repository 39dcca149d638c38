"""Linear layers over weights in group-wise int4."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qnext_kernels import force_backend, linear, pack_weight_, unpack_weight_
from qnext_kernels.fp8 import FP8
from qnext_kernels.integers import INT4, INT_GROUPS, dequantize_int4, quantize_int4
from tests.kernels.int4_inputs import random_int4_weight, words_of
from tests.kernels.kernel_inputs import DTYPES, NATIVE_BACKENDS, Bad, assert_close, same_bits


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def every_code(rows: int, k: int) -> Tensor:
    """[rows, k] codes, of which 128 columns of a row have each of the 16 in each place of a word."""
    row, column = torch.arange(rows)[:, None], torch.arange(k)
    return (row + column + column // 8) % 16


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", INT_GROUPS)
# Below, at and above panels of rows, and tokens that meet a panel at once and in two, three and more tiles.
@pytest.mark.parametrize(
    ("tokens", "rows", "groups"),
    [
        (0, 5, 1),
        (1, 1, 1),
        (1, 127, 2),
        (2, 128, 4),
        (3, 129, 3),
        (5, 320, 4),
        (6, 64, 5),
        (7, 63, 2),
        (12, 192, 1),
        (13, 65, 7),
        (19, 130, 3),
        (70, 200, 2),
        (300, 70, 3),
        (4, 0, 2),
    ],
)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_linear_in_int4_agrees_with_float64(
    backend: str, tokens: int, rows: int, groups: int, group: int, dtype: torch.dtype, bias: bool
) -> None:
    k = groups * group
    x, (weight, scale) = torch.randn(tokens, k, dtype=dtype), random_int4_weight(rows, k, group=group, dtype=dtype)
    shift = torch.randn(rows, dtype=dtype) if bias else None
    with force_backend(backend):
        out = linear(x, weight, shift, scale=scale)
    assert out.dtype == dtype
    truth = F.linear(x.double(), dequantize_int4(weight, scale, torch.float64), None if not bias else shift.double())
    assert_close(out, truth, {torch.float32: k + 2})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("together", [1, 4, 9, 13, 128])
@pytest.mark.parametrize("group", INT_GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_reads_every_code_and_every_scale_in_every_place_exactly(
    dtype: torch.dtype, group: int, together: int, packed: bool
) -> None:
    rows, k = 150, 128
    codes, groups = every_code(rows, k), k // group
    # Numbers whose products with codes bfloat16 has.
    scale = (1 + (7 * torch.arange(rows)[:, None] + 3 * torch.arange(groups)) % 31).to(dtype)
    expected = (codes - 8) * scale.float().repeat_interleave(group, dim=1)
    weight = words_of(codes)
    with force_backend("native"):
        assert not packed or pack_weight_(weight, scale)
        # Products with one and zeros have no rounding.
        out = torch.cat([linear(x, weight, None, packed, scale) for x in torch.eye(k, dtype=dtype).split(together)])
    assert torch.equal(out.T.float(), expected)


@pytest.mark.parametrize("group", INT_GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_row_in_int4_does_not_depend_on_the_batch_or_on_threads(dtype: torch.dtype, group: int) -> None:
    k = 9 * group
    x, (weight, scale) = torch.randn(500, k, dtype=dtype), random_int4_weight(137, k, group=group, dtype=dtype)
    with force_backend("native"):
        together = linear(x, weight, scale=scale)
        for begin, tokens in enumerate((1, 2, 3, 4, 5, 6, 7, 12, 13, 19, 70, 300)):
            some = slice(begin, begin + tokens)
            for count in (1, 2):
                torch.set_num_threads(count)
                assert same_bits(linear(x[some], weight, scale=scale), together[some])


# Below, at and above panels of 64 rows.
@pytest.mark.parametrize(("rows", "groups"), [(63, 2), (64, 1), (65, 5), (200, 4)])
@pytest.mark.parametrize("group", INT_GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_packed_weight_in_int4_gives_the_bits_of_the_plain_one(
    dtype: torch.dtype, group: int, rows: int, groups: int
) -> None:
    k, bias = groups * group, torch.randn(rows, dtype=dtype)
    weight, scale = random_int4_weight(rows, k, group=group, dtype=dtype)
    packed, packed_scale = weight.clone(), scale.clone()
    with force_backend("native"):
        assert pack_weight_(packed, packed_scale)
        assert same_bits(packed, weight) == (rows < 64)
        assert same_bits(packed_scale, scale) == (rows < 64 or groups == 1)
        for tokens in (0, 1, 2, 3, 5, 6, 7, 12, 13, 19, 70, 300):
            x = torch.randn(tokens, k, dtype=dtype)
            out = linear(x, packed, bias, packed=True, scale=packed_scale)
            assert same_bits(out, linear(x, weight, bias, scale=scale))
        unpack_weight_(packed, packed_scale)
    assert same_bits(packed, weight)
    assert same_bits(packed_scale, scale)


def test_native_matrices_in_int4_are_packed_each_for_itself() -> None:
    weights, scales = random_int4_weight(3, 70, 64, group=32, dtype=torch.float32)
    packed, packed_scales = weights.clone(), scales.clone()
    with force_backend("native"):
        assert pack_weight_(packed, packed_scales)
        x = torch.randn(2, 64)
        for n in range(3):
            out = linear(x, packed[n], packed=True, scale=packed_scales[n])
            assert same_bits(out, linear(x, weights[n], scale=scales[n]))
        unpack_weight_(packed, packed_scales)
    assert same_bits(packed, weights)
    assert same_bits(packed_scales, scales)


def test_weight_in_int4_that_cannot_be_packed_stays_as_it_is() -> None:
    wide, wide_scale = random_int4_weight(64, 128, group=32, dtype=torch.float32)
    half, half_scale = wide[:, ::2], wide_scale[:, ::2]
    for weight, scale in ((half, half_scale.contiguous()), (half.contiguous(), half_scale)):
        before, scale_before = weight.clone(), scale.clone()
        with force_backend("native"):
            assert not pack_weight_(weight, scale)
        assert same_bits(weight, before)
        assert same_bits(scale, scale_before)
    with force_backend("cpu"):
        assert not pack_weight_(wide, wide_scale)


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_views_in_int4_give_what_contiguous_tensors_do(backend: str) -> None:
    (weight, scale), x = random_int4_weight(200, 256, group=32, dtype=torch.float32), torch.randn(5, 2, 256)
    views = x[:, 1, ::2], weight[:, ::2], scale[:, ::2]
    with force_backend(backend):
        out = linear(*views[:2], scale=views[2])
        x, weight, scale = (view.contiguous() for view in views)
        assert same_bits(out, linear(x, weight, scale=scale))


def test_torch_compile_keeps_a_linear_in_int4() -> None:
    x, (weight, scale) = torch.randn(3, 64), random_int4_weight(70, 64, group=32, dtype=torch.float32)
    torch._dynamo.reset()
    with force_backend("native"):
        compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
        assert same_bits(compiled(x, weight, None, False, scale), linear(x, weight, None, False, scale))


@pytest.mark.parametrize(
    "bad",
    [
        Bad("x", "of columns not in eights", lambda x: x[:, :-4], ValueError),
        Bad("weight", "in int64", lambda x: x.long(), TypeError),
        Bad("weight", "in float32", lambda x: x.float(), TypeError),
        Bad("weight", "of fewer columns", lambda x: x[:, :-1], ValueError),
        Bad("weight", "of one dimension", lambda x: x[0], ValueError),
        Bad("scale", "in bfloat16", lambda x: x.bfloat16(), TypeError),
        Bad("scale", "of fewer rows", lambda x: x[:-1], ValueError),
        Bad("scale", "of fewer groups", lambda x: x[:, :-1], ValueError),
        Bad("scale", "of no groups", lambda x: x[:, :0], ValueError),
        Bad("scale", "of groups of 16", lambda x: x.repeat_interleave(4, dim=1), ValueError),
        Bad("scale", "of groups of 256", lambda x: x[:, ::4], ValueError),
    ],
    ids=str,
)
def test_linear_in_int4_refuses_bad_input_by_name(bad: Bad) -> None:
    weight, scale = random_int4_weight(130, 256, group=64, dtype=torch.float32)
    arguments = {"x": torch.randn(2, 256), "weight": weight, "scale": scale}
    with pytest.raises(bad.error, match=f"^{bad.argument}:"):
        linear(**(arguments | {bad.argument: bad.change(arguments[bad.argument])}))


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_weight_in_int4_without_columns_is_refused(backend: str) -> None:
    with force_backend(backend), pytest.raises(ValueError, match=r"^scale:"):
        linear(torch.randn(2, 0), torch.zeros(4, 0, dtype=INT4), scale=torch.ones(4, 0))


def test_weight_in_int4_without_a_scale_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^weight: expected torch.float32, got torch.int32"):
        linear(torch.randn(2, 8), torch.zeros(4, 8, dtype=INT4))


@pytest.mark.parametrize("change", [pack_weight_, unpack_weight_])
@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (torch.zeros(64, 8, dtype=INT4), None),
        (torch.zeros(64, 8, dtype=INT4), torch.ones(64, 4)),
        (torch.zeros(64, 8, dtype=INT4), torch.ones(63, 2)),
        (torch.zeros(64, 64), torch.ones(64, 2)),
        (torch.zeros(64, 64).to(FP8), torch.ones(1, 1)),
    ],
    ids=["missing", "groups of 16", "fewer rows", "of float32", "of FP8"],
)
def test_packing_refuses_a_scale_that_is_missing_or_does_not_belong(
    change: object, weight: Tensor, scale: Tensor | None
) -> None:
    with force_backend("native"), pytest.raises(ValueError, match=r"^scale:"):
        change(weight, scale)  # type: ignore[operator]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("group", INT_GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_rounded_to_the_nearest_step_of_their_group(dtype: torch.dtype, group: int, groups: int) -> None:
    weight = torch.randn(7, groups * group, dtype=dtype)
    weight[2, :group] = 0
    words, scale = quantize_int4(weight, group)
    assert (words.dtype, scale.dtype) == (INT4, dtype)
    assert (words.shape, scale.shape) == ((7, groups * group // 8), (7, groups))
    back = dequantize_int4(words, scale, torch.float64)
    steps = scale.double().repeat_interleave(group, dim=1)
    # Half a step, also of the largest magnitude, which is 7.5 of them but for the rounding of the scale.
    assert ((back - weight.double()).abs() <= steps * (0.5 + 4 * torch.finfo(dtype).eps)).all()
    assert not back[2, :group].any()
    largest = (back / steps).unflatten(1, (groups, group)).abs().amax(dim=-1).flatten().tolist()
    assert {0, 7} <= set(largest) <= {0, 7, 8}


def test_numbers_in_int4_are_read_back_as_they_are() -> None:
    codes = every_code(33, 256)
    assert torch.equal(dequantize_int4(words_of(codes), torch.ones(33, 2), torch.float32), (codes - 8).float())
