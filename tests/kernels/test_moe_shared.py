"""The shared expert and weights in FP8, on CPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from qnext_kernels import experts, experts_fp8, force_backend, topk_softmax
from qnext_kernels.moe.reference import (
    FP8_GROUP,
    dequantize_blocks,
    dequantize_groups,
    dequantize_w13,
    quantize_groups,
)
from tests.kernels.kernel_inputs import DTYPES, NATIVE_BACKENDS, Bad, assert_close, same_bits
from tests.kernels.moe_inputs import (
    HIDDEN,
    MIDDLE,
    SHARED_MIDDLE,
    TOP_K,
    fp8_roundings,
    in_float64,
    random_experts,
    random_fp8,
    rows_of,
)
from tests.kernels.test_moe import randomize, transformers_config


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_experts_with_a_shared_one_agree_with_float64(backend: str, tokens: int, dtype: torch.dtype) -> None:
    arguments = random_experts(tokens, dtype, shared=True)
    with force_backend(backend):
        out = experts(**arguments)
    with force_backend("reference"):
        truth = experts(**in_float64(arguments))
    assert out.dtype == dtype
    # As without, and the results of both kinds and the gate's logit are rounded.
    assert_close(out, truth, {torch.float32: 2 * HIDDEN + MIDDLE + SHARED_MIDDLE, dtype: 6})


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_a_shared_expert_and_its_gate_are_those_of_transformers(backend: str) -> None:
    block = randomize(Qwen3NextSparseMoeBlock(transformers_config()))
    x = torch.randn(33, HIDDEN)
    routed, shared = block.experts, block.shared_expert
    w13 = torch.cat([shared.gate_proj.weight, shared.up_proj.weight])
    with force_backend(backend):
        choice = topk_softmax(block.gate(x)[0], TOP_K, True)
        extra = w13, shared.down_proj.weight, block.shared_expert_gate.weight[0]
        out = experts(x, routed.gate_up_proj, routed.down_proj, *choice, shared=extra)
    assert_close(out, block(x[None])[0], {torch.float32: 2 * (HIDDEN + MIDDLE)})


def test_native_experts_with_a_shared_one_do_not_depend_on_the_batch() -> None:
    arguments = random_experts(17, torch.bfloat16, shared=True)
    with force_backend("native"):
        together = experts(**arguments)
        for some in (slice(0, 1), slice(3, 9)):
            assert same_bits(experts(**rows_of(arguments, some)), together[some])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_experts_in_fp8_agree_with_float64(backend: str, tokens: int, dtype: torch.dtype, shared: bool) -> None:
    arguments = random_fp8(tokens, dtype, shared=shared)
    with force_backend("cpu" if backend == "native" else backend):
        out = experts_fp8(**arguments)
    with force_backend("reference"):
        truth = experts_fp8(**in_float64(arguments))
    assert out.dtype == dtype
    assert_close(out, truth, fp8_roundings(arguments))


def test_experts_in_fp8_are_those_of_the_numbers_that_the_weights_stand_for() -> None:
    arguments = random_fp8(9, torch.float32)
    w13 = dequantize_w13(arguments["w13"], arguments["w13_scale"], torch.float32)
    w2 = dequantize_blocks(arguments["w2"], arguments["w2_scale"], torch.float32)
    with force_backend("reference"):
        out = experts_fp8(**arguments)
        plain = experts(arguments["x"], w13, w2, arguments["topk_weights"], arguments["topk_ids"])
    # Activations are rounded twice, x and what comes out of SwiGLU, by at most a sixteenth.
    assert 0 < (out - plain).norm() <= 2**0.5 / 16 * plain.norm()


def test_a_group_of_activations_keeps_its_largest_and_its_zeros() -> None:
    x = torch.randn(5, 2 * FP8_GROUP + 9, dtype=torch.bfloat16)
    x[1, :FP8_GROUP] = 0
    quantized, scales = quantize_groups(x)
    assert quantized.dtype == torch.float8_e4m3fn
    assert scales.shape == (5, 3)
    back = dequantize_groups(quantized, scales, torch.float32)
    assert not back[1, :FP8_GROUP].any()
    for group, ours in zip(x.float().split(FP8_GROUP, dim=1), back.split(FP8_GROUP, dim=1), strict=True):
        largest = group.abs().amax(dim=1)
        torch.testing.assert_close(ours.abs().amax(dim=1), largest, rtol=2**-22, atol=0)
        # Half a unit of three bits of mantissa; below the smallest exponent, of the smallest number.
        assert ((ours - group).abs() <= torch.maximum(group.abs() / 16, largest[:, None] / 448 * 2**-10) * 1.001).all()


@pytest.mark.parametrize(
    "bad",
    [
        Bad("w13", "bfloat16", lambda x: x.bfloat16(), TypeError),
        Bad("w2", "another intermediate size", lambda x: x[:, :, :-1], ValueError),
        Bad("w13_scale", "one for gate and up together", lambda x: x[:, ::2], ValueError),
        Bad("w13_scale", "bfloat16", lambda x: x.bfloat16(), TypeError),
        Bad("w2_scale", "of fewer groups", lambda x: x[:, :, :-1], ValueError),
        Bad("topk_ids", "beyond the experts", lambda x: x + 9, IndexError),
    ],
    ids=str,
)
def test_experts_in_fp8_refuse_bad_input_by_name(bad: Bad) -> None:
    arguments = random_fp8(5, torch.float32)
    with pytest.raises(bad.error, match=f"^{bad.argument}:"):
        experts_fp8(**(arguments | {bad.argument: bad.change(arguments[bad.argument])}))


@pytest.mark.parametrize(
    ("place", "change", "name", "error"),
    [
        (0, lambda x: x[:-1], "shared_w13", ValueError),
        (0, lambda x: x.double(), "shared_w13", TypeError),
        (1, lambda x: x[:, :-1], "shared_w2", ValueError),
        (2, lambda x: x[None], "shared_gate", ValueError),
        (2, lambda x: x.double(), "shared_gate", TypeError),
    ],
)
def test_a_bad_shared_expert_is_refused_by_name(place: int, change: Any, name: str, error: type[Exception]) -> None:
    arguments = random_experts(5, torch.float32, shared=True)
    shared: list[Tensor] = list(arguments["shared"])
    shared[place] = change(shared[place])
    with pytest.raises(error, match=f"^{name}:"):
        experts(**(arguments | {"shared": tuple(shared)}))


def test_scales_of_a_shared_expert_are_checked_and_packed_weights_refused() -> None:
    arguments = random_fp8(5, torch.float32, shared=True)
    up, up_scale, down, down_scale, gate = arguments["shared"]
    with pytest.raises(ValueError, match=r"^shared_w2_scale:"):
        experts_fp8(**(arguments | {"shared": (up, up_scale, down, down_scale[:-1], gate)}))
    with pytest.raises(ValueError, match=r"^packed:"):
        experts(**random_experts(5, torch.float32, shared=True), packed=True)
