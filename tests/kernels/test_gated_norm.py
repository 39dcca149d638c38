from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from qnext_kernels import force_backend, gated_rms_norm
from tests.kernels.kernel_inputs import DTYPES, NATIVE_BACKENDS, Bad, assert_close, same_bits

EPS = 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 4, 128), (3, 33), (2, 1, 3, 39), (65,), (1, 1, 4), (3, 1), (0, 2, 16)])
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_agrees_with_float64_and_rounds_once(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, z, weight = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype) * 3, torch.randn(shape[-1])
    with force_backend(backend):
        out = gated_rms_norm(x, z, weight, EPS)
    with force_backend("reference"):
        truth = gated_rms_norm(x.double(), z.double(), weight.double(), EPS)
    assert out.dtype == dtype
    assert_close(out, truth, {torch.float32: shape[-1]})


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_agrees_with_transformers(backend: str) -> None:
    module = Qwen3NextRMSNormGated(48, eps=EPS)
    torch.nn.init.normal_(module.weight)
    x, z = torch.randn(9, 48), torch.randn(9, 48)
    with force_backend(backend):
        assert_close(gated_rms_norm(x, z, module.weight, EPS), module(x, z), {torch.float32: 2 * 48})


@pytest.mark.parametrize("weight_dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("z_dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_gate_and_weight_may_have_other_dtypes(
    backend: str, dtype: torch.dtype, z_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x, z, weight = (torch.randn(s, dtype=d) for s, d in (((3, 20), dtype), ((3, 20), z_dtype), (20, weight_dtype)))
    with force_backend(backend):
        out = gated_rms_norm(x, z, weight, EPS)
    with force_backend("reference"):
        truth = gated_rms_norm(x.double(), z.double(), weight.double(), EPS)
    assert out.dtype == dtype
    assert_close(out, truth, {torch.float32: 20})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["native"])
def test_strided_views_have_the_bits_of_contiguous_rows(backend: str, dtype: torch.dtype) -> None:
    # One group of a projection: per key head something, then two value heads.
    x, wide = torch.randn(5, 8, 16, dtype=dtype), torch.randn(5, 4, 40, dtype=dtype)
    z, weight = wide[:, :, 8:].unflatten(2, (2, 16)), torch.randn(16)
    cases = [(x, z.reshape(5, 8, 16)), (x[:, ::2], z[:, :, 1]), (x[:, ::2], wide[:, :, 3:19]), (x.mT, x.mT)]
    with force_backend(backend):
        for a, b in cases:
            ours = gated_rms_norm(a, b, weight[: a.shape[-1]], EPS)
            assert same_bits(ours, gated_rms_norm(a.contiguous(), b.contiguous(), weight[: a.shape[-1]], EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_a_destination_gets_the_bits_of_the_result_and_may_be_the_input(backend: str, dtype: torch.dtype) -> None:
    x, z, weight = torch.randn(5, 4, 33, dtype=dtype), torch.randn(5, 4, 40, dtype=dtype)[..., 3:36], torch.randn(33)
    whole = torch.full((9, 4, 33), math.nan, dtype=dtype)
    with force_backend(backend):
        expected = gated_rms_norm(x, z, weight, EPS)
        for out in (whole[2:7], x):
            assert gated_rms_norm(x, z, weight, EPS, out) is out
            assert same_bits(out, expected)
    assert whole[[0, 1, 7, 8]].isnan().all()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("heads", "width"), [(3, 20), (3, 33), (16, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_a_row_does_not_depend_on_the_batch(backend: str, dtype: torch.dtype, heads: int, width: int) -> None:
    x, z = torch.randn(2, 25, heads, width, dtype=dtype)
    weight = torch.randn(width)
    order = torch.randperm(25)
    with force_backend(backend):
        together = gated_rms_norm(x, z, weight, EPS)
        shuffled = gated_rms_norm(x[order], z[order], weight, EPS)
        alone = torch.cat([gated_rms_norm(x[n : n + 1], z[n : n + 1], weight, EPS) for n in range(25)])
    assert same_bits(together, alone)
    assert same_bits(together[order], shuffled)


@pytest.mark.parametrize(
    "bad",
    [
        Bad("x", "integers", lambda x: x.long(), TypeError),
        Bad("z", "of fewer rows", lambda x: x[:1], ValueError),
        Bad("z", "integers", lambda x: x.long(), TypeError),
        Bad("weight", "another width", lambda x: x[:-1], ValueError),
        Bad("weight", "integers", lambda x: x.long(), TypeError),
        Bad("out", "of fewer rows", lambda x: x[:1], ValueError),
        Bad("out", "of another dtype", lambda x: x.double(), TypeError),
        Bad("out", "columns", lambda x: x.t().contiguous().t(), ValueError),
    ],
    ids=str,
)
def test_bad_input_is_refused_by_name(bad: Bad) -> None:
    given: dict[str, Any] = {"x": torch.ones(2, 8), "weight": torch.ones(8), "z": torch.ones(2, 8)}
    given["out"] = torch.ones(2, 8)
    with pytest.raises(bad.error, match=f"^{bad.argument}:"):
        gated_rms_norm(**(given | {bad.argument: bad.change(given[bad.argument])}), eps=EPS)
