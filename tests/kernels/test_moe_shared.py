"""The shared expert and weights in FP8, on CPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from qnext_kernels import (
    experts,
    experts_fp8,
    experts_int4,
    force_backend,
    pack_experts_,
    topk_softmax,
    unpack_experts_,
)
from qnext_kernels.dispatch import BackendError
from qnext_kernels.fp8 import (
    FP8,
    FP8_GROUP,
    dequantize_blocks,
    dequantize_groups,
    dequantize_w13,
    quantize_groups,
)
from qnext_kernels.integers import INT4
from tests.kernels.kernel_inputs import DTYPES, NATIVE_BACKENDS, Bad, assert_close, same_bits
from tests.kernels.moe_inputs import (
    EXPERTS,
    HIDDEN,
    MIDDLE,
    SHARED_MIDDLE,
    TOP_K,
    fp8_roundings,
    in_float64,
    random_choice,
    random_experts,
    random_fp8,
    random_int4,
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


CALLS: dict[torch.dtype, Any] = {FP8: experts_fp8, INT4: experts_int4}
CALLS |= dict.fromkeys((torch.float32, torch.bfloat16), experts)


def on_threads(count: int, arguments: dict[str, Any]) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with force_backend("native"):
            return CALLS[arguments["w13"].dtype](**arguments)
    finally:
        torch.set_num_threads(before)


# Columns of some panels, which divide among threads evenly, so that each has its own, or not.
@pytest.mark.parametrize("tokens", [20, 150])
@pytest.mark.parametrize(
    "arguments",
    [
        lambda tokens: random_experts(tokens, torch.float32, shared=True, hidden=300),
        lambda tokens: random_experts(tokens, torch.bfloat16, shared=True, hidden=300),
        lambda tokens: random_fp8(tokens, torch.bfloat16, shared=True) | {"quantize_activations": False},
        lambda tokens: random_int4(tokens, torch.bfloat16, group=128, shared=torch.uint8),
    ],
    ids=["float32", "bfloat16", "fp8", "int4"],
)
def test_native_experts_have_the_same_bits_on_any_number_of_threads(arguments: Any, tokens: int) -> None:
    given = arguments(tokens)
    alone = on_threads(1, given)
    for count in (2, 3, 5, 7):
        assert same_bits(on_threads(count, given), alone)


def test_native_experts_of_many_tokens_have_the_same_bits_on_any_number_of_threads() -> None:
    # Products that lie apart before they are added up are more than fit there at once.
    given = random_experts(5000, torch.bfloat16, shared=True, hidden=1100)
    assert (given["topk_ids"] >= 0).sum() + 5000 > (1 << 18) / (1100 // 64 + 1)
    assert same_bits(on_threads(5, given), on_threads(1, given))


# Sizes of the shared expert beside the routed ones' that have fewer, as many and more panels, whole and not.
@pytest.mark.parametrize("shared_middle", [24, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_experts_with_a_shared_one_give_the_bits_of_the_plain_ones(
    dtype: torch.dtype, shared_middle: int
) -> None:
    hidden, middle = 130, 96
    w13, w2 = (torch.randn(shape).to(dtype) for shape in ((EXPERTS, 2 * middle, hidden), (EXPERTS, hidden, middle)))
    up, down, gate = (
        torch.randn(shape).to(dtype) for shape in ((2 * shared_middle, hidden), (hidden, shared_middle), (hidden,))
    )
    x, choice = torch.randn(300, hidden).to(dtype), random_choice(300)
    packed = [weight.clone() for weight in (w13, w2, up, down)]
    with force_backend("native"):
        assert pack_experts_(*packed[:2], (packed[2], packed[3]))
        for some in (slice(0, 1), slice(1, 3), slice(0, 300)):
            rows = x[some], *(part[some] for part in choice)
            plain = experts(rows[0], w13, w2, *rows[1:], shared=(up, down, gate))
            out = experts(rows[0], *packed[:2], *rows[1:], packed=True, shared=(packed[2], packed[3], gate))
            assert same_bits(out, plain)
        unpack_experts_(*packed[:2], (packed[2], packed[3]))
    for weight, original in zip(packed, (w13, w2, up, down), strict=True):
        assert same_bits(weight, original)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_strided_shared_expert_gives_what_a_contiguous_one_does(part: int) -> None:
    arguments = random_experts(5, torch.float32, shared=True)
    shared = list(arguments["shared"])
    shared[part] = torch.stack([shared[part], torch.zeros_like(shared[part])], dim=-1)[..., 0]
    with force_backend("native"):
        out, truth = experts(**(arguments | {"shared": tuple(shared)})), experts(**arguments)
    assert_close(out, truth, {torch.float32: HIDDEN + SHARED_MIDDLE})


def test_experts_are_packed_with_the_shared_one_or_not_at_all() -> None:
    arguments = random_experts(1, torch.bfloat16, shared=True)
    up, down, _ = arguments["shared"]
    before = arguments["w13"].clone()
    with force_backend("native"):
        assert not pack_experts_(arguments["w13"], arguments["w2"], (up, down[:, :-1]))
    assert same_bits(arguments["w13"], before)


def test_backend_that_reads_no_packed_experts_says_so() -> None:
    with force_backend("cpu"), pytest.raises(BackendError, match=r"^packed: backend cpu"):
        experts(**random_experts(5, torch.float32, shared=True), packed=True)


@pytest.mark.parametrize("bad", [-2, EXPERTS])
def test_ids_that_the_kernel_finds_wrong_are_named(bad: int) -> None:
    arguments = random_experts(5, torch.float32, shared=True)
    arguments["topk_ids"][3, 1] = bad
    with force_backend("native"), pytest.raises(IndexError, match=r"^topk_ids:"):
        experts(**arguments)


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


def test_scales_of_a_shared_expert_are_checked() -> None:
    arguments = random_fp8(5, torch.float32, shared=True)
    up, up_scale, down, down_scale, gate = arguments["shared"]
    with pytest.raises(ValueError, match=r"^shared_w2_scale:"):
        experts_fp8(**(arguments | {"shared": (up, up_scale, down, down_scale[:-1], gate)}))
