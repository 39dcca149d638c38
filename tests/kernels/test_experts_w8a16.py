"""Experts over weights in block-wise FP8 whose activations are not quantized, as on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qnext_kernels import experts, experts_fp8, force_backend, pack_experts_fp8_, unpack_experts_fp8_
from qnext_kernels.dispatch import BackendError
from qnext_kernels.fp8 import dequantize_blocks, dequantize_w13
from tests.kernels.kernel_inputs import DTYPES, NATIVE_BACKENDS, assert_close, same_bits
from tests.kernels.moe_inputs import (
    FP8_HIDDEN,
    FP8_MIDDLE,
    FP8_SHARED_MIDDLE,
    in_float64,
    random_choice,
    random_fp8,
    rows_of,
)
from tests.kernels.test_linear_fp8 import weight_of

ROUTED = ("w13", "w13_scale", "w2", "w2_scale")


def run(arguments: dict[str, Any], **changes: Any) -> Tensor:
    return experts_fp8(**(arguments | changes), quantize_activations=False)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 9, 70])
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_experts_agree_with_float64(backend: str, tokens: int, dtype: torch.dtype, shared: bool) -> None:
    arguments = random_fp8(tokens, dtype, shared=shared)
    with force_backend(backend):
        out = run(arguments)
    with force_backend("reference"):
        truth = run(in_float64(arguments))
    assert out.dtype == dtype
    roundings = FP8_HIDDEN + FP8_MIDDLE + (FP8_HIDDEN + FP8_SHARED_MIDDLE) * shared
    assert_close(out, truth, {torch.float32: roundings, dtype: 2 + 4 * shared})


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_experts_are_those_of_the_numbers_that_the_weights_stand_for(backend: str) -> None:
    arguments = random_fp8(9, torch.float32)
    w13 = dequantize_w13(arguments["w13"], arguments["w13_scale"], torch.float64)
    w2 = dequantize_blocks(arguments["w2"], arguments["w2_scale"], torch.float64)
    with force_backend("reference"):
        truth = experts(arguments["x"].double(), w13, w2, arguments["topk_weights"], arguments["topk_ids"])
    with force_backend(backend):
        assert_close(run(arguments), truth, {torch.float32: FP8_HIDDEN + FP8_MIDDLE})


def test_native_experts_do_not_depend_on_the_batch() -> None:
    arguments = random_fp8(90, torch.bfloat16, shared=True)
    with force_backend("native"):
        together = run(arguments)
        for some in (slice(0, 1), slice(3, 9), slice(20, 60)):
            assert same_bits(run(rows_of(arguments, some)), together[some])


# Panels and blocks that are whole and not, of the routed experts and of the shared one.
@pytest.mark.parametrize(("hidden", "middle", "shared_middle"), [(256, 128, 128), (130, 96, 200), (320, 192, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_experts_give_the_bits_of_the_plain_ones(
    dtype: torch.dtype, hidden: int, middle: int, shared_middle: int
) -> None:
    count = 4

    def of_experts(rows: int, k: int) -> tuple[Tensor, Tensor]:
        weights, scales = zip(*(weight_of(rows, k) for _ in range(count)), strict=True)
        return torch.stack(weights), torch.stack(scales)

    def gate_and_up(rows: int, k: int) -> tuple[Tensor, Tensor]:
        (gate, gate_scale), (up, up_scale) = weight_of(rows, k), weight_of(rows, k)
        return torch.cat([gate, up]), torch.cat([gate_scale, up_scale])

    both = [gate_and_up(middle, hidden) for _ in range(count)]
    routed = [torch.stack(parts) for parts in zip(*both, strict=True)] + list(of_experts(hidden, middle))
    shared = [*gate_and_up(shared_middle, hidden), *weight_of(hidden, shared_middle), torch.randn(hidden).to(dtype)]
    arguments = dict(zip(ROUTED, routed, strict=True))
    x, choice = torch.randn(300, hidden).to(dtype), random_choice(300, count, 2)
    packed = {name: weight.clone() for name, weight in arguments.items()}
    up, down = shared[0].clone(), shared[2].clone()
    with force_backend("native"):
        assert pack_experts_fp8_(*packed.values(), (up, down))
        assert not same_bits(up, shared[0])
        for some in (slice(0, 1), slice(1, 3), slice(0, 300)):
            rows = {"x": x[some], "topk_weights": choice[0][some], "topk_ids": choice[1][some]}
            plain = run(arguments | rows, shared=tuple(shared))
            out = run(packed | rows, packed=True, shared=(up, shared[1], down, *shared[3:]))
            assert same_bits(out, plain)
        unpack_experts_fp8_(*packed.values(), (up, down))
    for name, weight in packed.items():
        assert same_bits(weight, arguments[name])
    assert same_bits(up, shared[0])
    assert same_bits(down, shared[2])


def test_experts_that_cannot_be_packed_stay_as_they_are() -> None:
    arguments = random_fp8(1, torch.bfloat16, shared=True)
    weights = [arguments[name] for name in ROUTED]
    up, _, down, *_ = arguments["shared"]
    before = weights[0].clone()
    with force_backend("native"):
        assert not pack_experts_fp8_(*weights, (up, down[:, :-1]))
    assert same_bits(weights[0], before)


@pytest.mark.parametrize("name", ROUTED)
def test_strided_weights_give_what_contiguous_ones_do(name: str) -> None:
    arguments = random_fp8(5, torch.float32)
    spread = torch.stack([arguments[name], torch.zeros_like(arguments[name])], dim=-1)[..., 0]
    assert not spread.is_contiguous()
    with force_backend("native"):
        out, truth = run(arguments, **{name: spread}), run(arguments)
    assert_close(out, truth, {torch.float32: FP8_HIDDEN + FP8_MIDDLE})


def test_packed_weights_are_for_activations_that_are_not_quantized() -> None:
    arguments = random_fp8(3, torch.bfloat16)
    with (
        force_backend("native"),
        pytest.raises(BackendError, match=r"^quantize_activations: .*expected False, got True"),
    ):
        experts_fp8(**arguments, packed=True)


@pytest.mark.parametrize("bad", [-2, 4])
def test_ids_that_are_no_experts_are_named(bad: int) -> None:
    arguments = random_fp8(5, torch.float32)
    arguments["topk_ids"][3, 1] = bad
    with force_backend("native"), pytest.raises(IndexError, match=r"^topk_ids:"):
        run(arguments)
