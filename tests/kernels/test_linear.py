from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from qnext_kernels import force_backend, linear, pack_weight_, unpack_weight_
from qnext_kernels.dispatch import BackendError
from tests.kernels.kernel_inputs import DTYPES, NATIVE_BACKENDS, Bad, assert_close, same_bits


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
# Around the block sizes of the C++ kernel: activations and rows at once, elements of a product, tokens packed at once.
@pytest.mark.parametrize(
    ("tokens", "rows", "k"),
    [
        (0, 5, 8),
        (1, 1, 1),
        (1, 129, 513),
        (2, 131, 40),
        (3, 7, 1025),
        (49, 130, 528),
        (485, 3, 24),
        (4, 0, 8),
        (3, 5, 0),
    ],
)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_linear_agrees_with_float64(
    backend: str, tokens: int, rows: int, k: int, dtype: torch.dtype, bias: bool
) -> None:
    x, weight = torch.randn(tokens, k, dtype=dtype), torch.randn(rows, k, dtype=dtype)
    shift = torch.randn(rows, dtype=dtype) if bias else None
    with force_backend(backend):
        out = linear(x, weight, shift)
    assert out.dtype == dtype
    truth = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
    assert_close(out, truth, {torch.float32: k + 1})


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_row_does_not_depend_on_the_batch_or_on_threads(dtype: torch.dtype) -> None:
    x, weight = torch.randn(500, 1040, dtype=dtype), torch.randn(137, 1040, dtype=dtype)
    with force_backend("native"):
        together = linear(x, weight)
        for some in (slice(0, 1), slice(3, 5), slice(40, 43), slice(100, 160), slice(0, 400)):
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                assert same_bits(linear(x[some], weight), together[some])
        assert same_bits(linear(x, weight[5:]), together[:, 5:].contiguous())


# Below, at and above a panel of 64 rows, and above what is multiplied with it at once.
@pytest.mark.parametrize(("rows", "k"), [(63, 8), (64, 6), (65, 1030), (200, 526)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weight_gives_the_bits_of_the_plain_one(dtype: torch.dtype, rows: int, k: int) -> None:
    weight, bias = torch.randn(rows, k, dtype=dtype), torch.randn(rows, dtype=dtype)
    packed = weight.clone()
    with force_backend("native"):
        assert pack_weight_(packed)
        assert torch.equal(packed, weight) == (rows < 64)
        for tokens in (0, 1, 3, 4, 7, 300):
            x = torch.randn(tokens, k, dtype=dtype)
            assert same_bits(linear(x, packed, bias, packed=True), linear(x, weight, bias))
        unpack_weight_(packed)
    assert same_bits(packed, weight)


def test_matrices_of_a_weight_are_packed_each_for_itself() -> None:
    weights = torch.randn(3, 70, 16)
    packed = weights.clone()
    with force_backend("native"):
        assert pack_weight_(packed)
        x = torch.randn(2, 16)
        for weight, one in zip(weights, packed, strict=True):
            assert same_bits(linear(x, one, packed=True), linear(x, weight))


def test_weight_that_cannot_be_packed_stays_as_it_is() -> None:
    odd, view = torch.randn(64, 7).bfloat16(), torch.randn(64, 16)[:, ::2]
    for weight in (odd, view):
        before = weight.clone()
        with force_backend("native"):
            assert not pack_weight_(weight)
        assert same_bits(weight, before)
    plain = torch.randn(64, 8)
    with force_backend("cpu"):
        assert not pack_weight_(plain)


def test_backend_that_reads_no_packed_weights_says_so() -> None:
    with force_backend("cpu"):
        with pytest.raises(BackendError, match=r"^packed: backend cpu reads weights as the checkpoint stores them"):
            linear(torch.ones(1, 8), torch.ones(64, 8), packed=True)
        with pytest.raises(BackendError, match=r"^packed: backend cpu"):
            unpack_weight_(torch.ones(64, 8))


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_linear_takes_views(backend: str) -> None:
    x, weight = torch.randn(5, 2, 32), torch.randn(16, 64)
    with force_backend(backend):
        for view, rows in (
            (x[:, 1], weight[:, ::2]),
            (x.transpose(1, 2)[:, :, 0], weight[:, 3:35]),
            (x[::2, 0], weight[::2, :32]),
        ):
            assert_close(linear(view, rows), view.double() @ rows.double().T, {torch.float32: 32})


@pytest.mark.parametrize(
    "bad",
    [
        Bad("x", "one dimension", lambda x: x[0], ValueError),
        Bad("x", "integers", lambda x: x.long(), TypeError),
        Bad("weight", "another input size", lambda x: x[:, :-1], ValueError),
        Bad("weight", "another float dtype", lambda x: x.bfloat16(), TypeError),
        Bad("bias", "of fewer rows", lambda x: x[:-1], ValueError),
        Bad("bias", "another float dtype", lambda x: x.bfloat16(), TypeError),
    ],
    ids=str,
)
def test_linear_refuses_bad_input_by_name(bad: Bad) -> None:
    arguments = {"x": torch.randn(3, 8), "weight": torch.randn(5, 8), "bias": torch.randn(5)}
    with pytest.raises(bad.error, match=f"^{bad.argument}:"):
        linear(**(arguments | {bad.argument: bad.change(arguments[bad.argument])}))
