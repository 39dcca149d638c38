from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from qnext_kernels import force_backend, rms_norm
from tests.kernels.kernel_inputs import DTYPES, NATIVE_BACKENDS, Bad, assert_close, same_bits

EPS = 1e-6
# The model's width, and widths around the parts that a vectorised kernel splits a row into.
SHAPES = [(7, 2048), (3, 5, 33), (2, 1, 3, 31), (5, 65), (4, 39), (16,), (1, 4), (3, 1), (0, 16)]


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_agrees_with_float64_and_rounds_once(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, with_residual: bool
) -> None:
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    residual = torch.randn(shape, dtype=dtype) if with_residual else None
    with force_backend(backend):
        normed, total = rms_norm(x, weight, EPS, residual)
    assert same_bits(total, x if residual is None else x + residual)
    with force_backend("reference"):
        truth, _ = rms_norm(total.double(), weight.double(), EPS)
    assert normed.dtype == dtype
    assert_close(normed, truth, {torch.float32: shape[-1]})


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_agrees_with_transformers(backend: str) -> None:
    module = Qwen3NextRMSNorm(48, eps=EPS)
    torch.nn.init.normal_(module.weight)
    x = torch.randn(9, 48)
    with force_backend(backend):
        normed, _ = rms_norm(x, module.weight, EPS)
    assert_close(normed, module(x), {torch.float32: 2 * 48})


@pytest.mark.parametrize("weight_dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_the_weight_may_have_another_dtype(backend: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 20, dtype=dtype), torch.randn(20, dtype=weight_dtype)
    with force_backend(backend):
        normed, _ = rms_norm(x, weight, EPS)
    with force_backend("reference"):
        truth, _ = rms_norm(x.double(), weight.double(), EPS)
    assert normed.dtype == dtype
    assert_close(normed, truth, {torch.float32: 20})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["native"])
def test_strided_views_have_the_bits_of_contiguous_rows(backend: str, dtype: torch.dtype) -> None:
    wide, weights = torch.randn(5, 4, 6, 50, dtype=dtype), torch.randn(33, 2)
    views = [wide[:, 1, 2, :33], wide[:, 1, ::2, 3:36], wide[..., 7:40], wide[0, 0].T, wide[:, :2, :, 9:10].mT]
    for x in views:
        weight = weights[: x.shape[-1], 0]
        # The residual lies in memory as x does, or contiguously.
        for residual in (x.flip(0), torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x.flip(0))):
            with force_backend(backend):
                strided, whole = rms_norm(x, weight, EPS, residual), rms_norm(x.contiguous(), weight, EPS, residual)
                assert same_bits(rms_norm(x, weight, EPS)[0], rms_norm(x.contiguous(), weight, EPS)[0])
            assert all(same_bits(one, other) for one, other in zip(strided, whole, strict=True))


def test_a_row_of_zeros_is_finite() -> None:
    normed, _ = rms_norm(torch.zeros(2, 16), torch.randn(16), EPS)
    assert same_bits(normed.abs(), torch.zeros(2, 16))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("width", [20, 129, 2048])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_a_row_does_not_depend_on_the_batch(backend: str, dtype: torch.dtype, width: int) -> None:
    x, residual, weight = torch.randn(25, width, dtype=dtype), torch.randn(25, width, dtype=dtype), torch.randn(width)
    order = torch.randperm(25)
    with force_backend(backend):
        together, _ = rms_norm(x, weight, EPS, residual)
        shuffled, _ = rms_norm(x[order], weight, EPS, residual[order])
        alone = torch.cat([rms_norm(x[n : n + 1], weight, EPS, residual[n : n + 1])[0] for n in range(25)])
    assert same_bits(together, alone)
    assert same_bits(together[order], shuffled)


@pytest.mark.parametrize(
    "bad",
    [
        Bad("x", "integers", lambda x: x.long(), TypeError),
        Bad("weight", "another width", lambda x: x[:-1], ValueError),
        Bad("weight", "two dimensions", lambda x: x[None], ValueError),
        Bad("weight", "integers", lambda x: x.long(), TypeError),
        Bad("residual", "of fewer rows", lambda x: x[:1], ValueError),
        Bad("residual", "another float dtype", lambda x: x.bfloat16(), TypeError),
    ],
    ids=str,
)
def test_bad_input_is_refused_by_name(bad: Bad) -> None:
    given: dict[str, Any] = {"x": torch.ones(2, 8), "weight": torch.ones(8), "residual": torch.ones(2, 8)}
    with pytest.raises(bad.error, match=f"^{bad.argument}:"):
        rms_norm(**(given | {bad.argument: bad.change(given[bad.argument])}), eps=EPS)
