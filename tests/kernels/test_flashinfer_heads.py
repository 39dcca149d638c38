"""QK-norm and RoPE in FlashInfer: what the backend declines, and numbers around its two functions.

That the installed package takes the arguments is held in ``test_flashinfer.py``.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext_kernels import OPERATIONS, force_backend, qk_norm_rope_gate
from qnext_kernels.dispatch import Call, deterministic, reason_to_decline
from qnext_kernels.gated_attention.flashinfer import FlashInferGatedAttention, flashinfer_qk_norm_rope_gate
from tests.kernels.kernel_inputs import assert_close, same_bits
from tests.kernels.test_gated_attention import MAX_POSITION, Layout, arguments, in_float64

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAYOUTS = [(4, 2, 256, 64), (3, 1, 64, 64), (2, 2, 128, 16)]


def gemma_rmsnorm(input: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """FlashInfer's by its documentation: rows of one dtype with their weight, computed in float32, rounded once."""
    for tensor in (input, weight, out):
        assert tensor.is_contiguous()
        assert tensor.dtype == input.dtype
    x = input.float()
    return out.copy_(x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * (1 + weight.float()))


def apply_rope_with_cos_sin_cache(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool
) -> tuple[Tensor, Tensor]:
    """FlashInfer's by its documentation; it would read beside the table for a position that is not in it."""
    assert cos_sin_cache.dtype == FP32
    assert cos_sin_cache.is_contiguous()
    assert positions.is_contiguous()
    assert is_neox
    assert 0 <= int(positions.min()) <= int(positions.max()) < len(cos_sin_cache)
    cos, sin = cos_sin_cache[positions][:, None].chunk(2, dim=-1)
    half = cos.shape[-1]

    def turned(x: Tensor) -> Tensor:
        heads = x.view(len(x), -1, head_size).float()
        first, second, rest = heads.split([half, half, head_size - 2 * half], dim=-1)
        parts = first * cos - second * sin, second * cos + first * sin, rest
        return torch.cat(parts, dim=-1).to(x.dtype).flatten(1)

    return turned(query), turned(key)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (gemma_rmsnorm, apply_rope_with_cos_sin_cache):
        name = "flashinfer.norm" if function is gemma_rmsnorm else "flashinfer.rope"
        library: Any = ModuleType(name)
        setattr(library, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setattr(FlashInferGatedAttention, "supports", lambda self, device, dtype: None)


def reason(dtype: torch.dtype = BF16, **facts: Any) -> str | None:
    given: dict[str, Any] = {"tokens": 8, "shape": (256, 64), "dtypes": (dtype, dtype, FP32)}
    return FlashInferGatedAttention().supports_call(GPU, dtype, Call("qk_norm_rope_gate", **given | facts))


def test_what_the_kernels_do_not_take_is_declined() -> None:
    assert FlashInferGatedAttention().supports(CPU, BF16) == "runs on cuda, not on cpu"
    with deterministic():
        why = reason_to_decline(FlashInferGatedAttention(), GPU, BF16)
    assert why == "is not batch invariant, as the deterministic mode requires"
    assert reason() is None
    assert reason(FP16) is None
    assert reason(shape=(256, 0)) == "turns dimensions by 16, got 0"
    assert reason(shape=(256, 40)) == "turns dimensions by 16, got 40"
    assert reason(shape=(96, 64)) == "needs a head dimension of 64, 128, 256, got 96"
    assert reason(dtypes=(BF16, BF16, BF16)) == "needs cos_sin in torch.float32, got torch.bfloat16"
    assert reason(dtypes=(BF16, FP32, FP32)) == "needs weights in torch.bfloat16, got torch.float32"


def agrees(layout: Layout, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    given = arguments(layout, tokens, dtype)
    with force_backend("reference"):
        truth = qk_norm_rope_gate(**in_float64(given))
    on_device = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    with force_backend("gated_attention=flashinfer"):
        q, k, v, gate = (x.cpu() for x in qk_norm_rope_gate(**on_device))
    # Both dimensions that RoPE turns into one have been rounded behind their norm.
    for actual, expected in ((q, truth[0]), (k, truth[1])):
        assert actual.dtype == dtype
        assert_close(actual, expected, {FP32: layout[2], dtype: 2})
    assert torch.equal(v.double(), truth[2])
    assert torch.equal(gate.double(), truth[3])


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("tokens", [0, 1, 11])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_float64_and_rounds_twice(layout: Layout, dtype: torch.dtype, tokens: int) -> None:
    agrees(layout, tokens, dtype, CPU)


@pytest.mark.usefixtures("stand_in")
def test_what_an_engine_hands_on_is_read_and_padding_reads_nothing_beside_the_table() -> None:
    given = arguments(LAYOUTS[0], 5, BF16)
    with force_backend("gated_attention=flashinfer"):
        whole = qk_norm_rope_gate(**given)
    positions = given["positions"].int()
    positions[1], positions[3] = MAX_POSITION, -1
    qkv = torch.cat([given["qkv"], torch.full((5, 3), float("nan"), dtype=BF16)], dim=1)[:, :-3]
    table = given["cos_sin"].repeat_interleave(2, dim=-1)[:, ::2]
    # As on a GPU, where the public function does not read positions.
    engines = given | {"qkv": qkv, "positions": positions, "cos_sin": table}
    for result, expected in zip(flashinfer_qk_norm_rope_gate(*engines.values()), whole, strict=True):
        assert result.is_contiguous()
        assert same_bits(result[[0, 2, 4]], expected[[0, 2, 4]])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 1, 300])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_float64_on_a_gpu(layout: Layout, tokens: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    (backend,) = (each for each in OPERATIONS["gated_attention"].backends if each.name == "flashinfer")
    if (why := backend.supports(GPU, BF16)) is not None:
        pytest.skip(f"flashinfer: {why}")
    agrees(layout, tokens, BF16, GPU)
