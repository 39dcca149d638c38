"""Linear layers over weights in group-wise int4 and int8."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qnext_kernels import force_backend, linear, pack_weight_, unpack_weight_
from qnext_kernels.fp8 import FP8
from qnext_kernels.integers import GROUPED, INT4, INT4_PER_WORD, INT8, INT_GROUPS, columns_of
from qnext_kernels.quantized import dequantize
from tests.kernels.integer_inputs import LEVELS, QUANTIZE, as_stored, random_weight
from tests.kernels.kernel_inputs import DTYPES, NATIVE_BACKENDS, Bad, assert_close, same_bits


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def every_number(rows: int, stored: torch.dtype) -> Tensor:
    """[rows, K], of which each row has each number in each column of a word in int4, or of two in int8."""
    numbers, columns = 2 * LEVELS[stored], INT4_PER_WORD if stored == INT4 else 2
    row, column = torch.arange(rows)[:, None], torch.arange(numbers * columns)
    return (row + column + column // columns) % numbers - LEVELS[stored]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", INT_GROUPS)
@pytest.mark.parametrize("stored", GROUPED)
# Below, at and above panels of rows, and tokens that meet a panel at once and in two, three and more tiles.
@pytest.mark.parametrize(
    ("tokens", "rows", "groups"),
    [
        (0, 5, 1),
        (3, 1, 1),
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
def test_linear_in_integers_agrees_with_float64(
    backend: str, tokens: int, rows: int, groups: int, stored: torch.dtype, group: int, dtype: torch.dtype, bias: bool
) -> None:
    k = groups * group
    x = torch.randn(tokens, k, dtype=dtype)
    weight, scale = random_weight(rows, k, stored=stored, group=group, dtype=dtype)
    shift = torch.randn(rows, dtype=dtype) if bias else None
    with force_backend(backend):
        out = linear(x, weight, shift, scale=scale)
    assert out.dtype == dtype
    truth = F.linear(x.double(), dequantize(weight, scale, torch.float64), None if not bias else shift.double())
    assert_close(out, truth, {torch.float32: k + 2})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("together", [1, 4, 9, 13, 128])
@pytest.mark.parametrize("group", INT_GROUPS)
@pytest.mark.parametrize("stored", GROUPED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_reads_every_number_and_every_scale_in_every_place_exactly(
    dtype: torch.dtype, stored: torch.dtype, group: int, together: int, packed: bool
) -> None:
    rows, numbers = 150, every_number(150, stored)
    k = numbers.shape[1]
    # Bfloat16 has their products with the numbers.
    scale = (2.0 ** ((7 * torch.arange(rows)[:, None] + 3 * torch.arange(k // group)) % 31)).to(dtype)
    expected = numbers * scale.float().repeat_interleave(group, dim=1)
    weight = as_stored(numbers, stored)
    with force_backend("native"):
        assert not packed or pack_weight_(weight, scale)
        # Products with one and zeros have no rounding.
        out = torch.cat([linear(x, weight, None, packed, scale) for x in torch.eye(k, dtype=dtype).split(together)])
    assert torch.equal(out.T.float(), expected)


@pytest.mark.parametrize("group", INT_GROUPS)
@pytest.mark.parametrize("stored", GROUPED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_row_does_not_depend_on_the_batch_or_on_threads(
    dtype: torch.dtype, stored: torch.dtype, group: int
) -> None:
    k = 9 * group
    x = torch.randn(500, k, dtype=dtype)
    weight, scale = random_weight(137, k, stored=stored, group=group, dtype=dtype)
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
@pytest.mark.parametrize("stored", GROUPED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_packed_weight_gives_the_bits_of_the_plain_one(
    dtype: torch.dtype, stored: torch.dtype, group: int, rows: int, groups: int
) -> None:
    k, bias = groups * group, torch.randn(rows, dtype=dtype)
    weight, scale = random_weight(rows, k, stored=stored, group=group, dtype=dtype)
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


@pytest.mark.parametrize("stored", GROUPED)
def test_native_matrices_are_packed_each_for_itself(stored: torch.dtype) -> None:
    weights, scales = random_weight(3, 70, 64, stored=stored, group=32, dtype=torch.float32)
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


@pytest.mark.parametrize("stored", GROUPED)
def test_weight_that_cannot_be_packed_stays_as_it_is(stored: torch.dtype) -> None:
    wide, wide_scale = random_weight(64, 128, stored=stored, group=32, dtype=torch.float32)
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
@pytest.mark.parametrize("stored", GROUPED)
def test_views_give_what_contiguous_tensors_do(stored: torch.dtype, backend: str) -> None:
    weight, scale = random_weight(200, 256, stored=stored, group=32, dtype=torch.float32)
    x = torch.randn(5, 2, 256)
    views = x[:, 1, ::2], weight[:, ::2], scale[:, ::2]
    with force_backend(backend):
        out = linear(*views[:2], scale=views[2])
        x, weight, scale = (view.contiguous() for view in views)
        assert same_bits(out, linear(x, weight, scale=scale))


@pytest.mark.parametrize("stored", GROUPED)
def test_torch_compile_keeps_a_linear_in_integers(stored: torch.dtype) -> None:
    x, (weight, scale) = torch.randn(3, 64), random_weight(70, 64, stored=stored, group=32, dtype=torch.float32)
    torch._dynamo.reset()
    with force_backend("native"):
        compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
        assert same_bits(compiled(x, weight, None, False, scale), linear(x, weight, None, False, scale))


@pytest.mark.parametrize(
    "bad",
    [
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
@pytest.mark.parametrize("stored", GROUPED)
def test_linear_in_integers_refuses_bad_input_by_name(stored: torch.dtype, bad: Bad) -> None:
    weight, scale = random_weight(130, 256, stored=stored, group=64, dtype=torch.float32)
    arguments = {"x": torch.randn(2, 256), "weight": weight, "scale": scale}
    with pytest.raises(bad.error, match=f"^{bad.argument}:"):
        linear(**(arguments | {bad.argument: bad.change(arguments[bad.argument])}))


def test_columns_that_are_not_in_eights_are_refused_beside_int4() -> None:
    weight, scale = random_weight(130, 256, stored=INT4, group=64, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^x: expected columns in eights"):
        linear(torch.randn(2, 252), weight, scale=scale)


@pytest.mark.parametrize("stored", GROUPED)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_weight_without_columns_is_refused(backend: str, stored: torch.dtype) -> None:
    with force_backend(backend), pytest.raises(ValueError, match=r"^scale:"):
        linear(torch.randn(2, 0), torch.zeros(4, 0, dtype=stored), scale=torch.ones(4, 0))


@pytest.mark.parametrize("stored", GROUPED)
def test_weight_without_a_scale_is_refused(stored: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"^weight: expected torch.float32, got {stored}"):
        linear(torch.randn(2, 8), torch.zeros(4, 8, dtype=stored))


@pytest.mark.parametrize("change", [pack_weight_, unpack_weight_])
@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (torch.zeros(64, 8, dtype=INT4), None),
        (torch.zeros(64, 8, dtype=INT4), torch.ones(64, 4)),
        (torch.zeros(64, 8, dtype=INT4), torch.ones(63, 2)),
        (torch.zeros(64, 64, dtype=INT8), None),
        (torch.zeros(64, 64, dtype=INT8), torch.ones(64, 4)),
        (torch.zeros(64, 64), torch.ones(64, 2)),
        (torch.zeros(64, 64).to(FP8), torch.ones(1, 1)),
    ],
    ids=["missing", "groups of 16", "fewer rows", "missing in int8", "groups of 16 in int8", "of float32", "of FP8"],
)
def test_packing_refuses_a_scale_that_is_missing_or_does_not_belong(
    change: object, weight: Tensor, scale: Tensor | None
) -> None:
    with force_backend("native"), pytest.raises(ValueError, match=r"^scale:"):
        change(weight, scale)  # type: ignore[operator]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("group", INT_GROUPS)
@pytest.mark.parametrize("stored", GROUPED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_rounded_to_the_nearest_step_of_their_group(
    dtype: torch.dtype, stored: torch.dtype, group: int, groups: int
) -> None:
    weight, levels = torch.randn(7, groups * group, dtype=dtype), LEVELS[stored]
    weight[2, :group] = 0
    quantized, scale = QUANTIZE[stored](weight, group)
    assert (quantized.dtype, scale.dtype) == (stored, dtype)
    assert (columns_of(quantized), scale.shape) == (groups * group, (7, groups))
    back = dequantize(quantized, scale, torch.float64)
    steps = scale.double().repeat_interleave(group, dim=1)
    # Half a step, also of the largest magnitude, which is half a step above a number but for the rounding of the scale.
    assert ((back - weight.double()).abs() <= steps * (0.5 + levels / 2 * torch.finfo(dtype).eps)).all()
    assert not back[2, :group].any()
    largest = (back / steps).unflatten(1, (groups, group)).abs().amax(dim=-1).flatten().tolist()
    assert {0, levels - 1} <= set(largest) <= {0, levels - 1, levels}


@pytest.mark.parametrize("stored", GROUPED)
def test_numbers_are_read_back_as_they_are(stored: torch.dtype) -> None:
    numbers = every_number(33, stored)
    scale = torch.ones(33, numbers.shape[1] // 128)
    assert torch.equal(dequantize(as_stored(numbers, stored), scale, torch.float32), numbers.float())
