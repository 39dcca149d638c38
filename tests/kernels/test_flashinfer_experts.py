"""The experts in FlashInfer: what the backend declines, weights laid out in place, and numbers around the call.

That the installed package takes the arguments is held in ``test_flashinfer.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qnext_kernels import (
    OPERATIONS,
    experts,
    experts_fp8,
    force_backend,
    pack_experts_,
    pack_experts_fp8_,
    topk_softmax,
    unpack_experts_,
    unpack_experts_fp8_,
)
from qnext_kernels.dispatch import BackendError, Call, deterministic, reason_to_decline
from qnext_kernels.moe.flashinfer import FlashInferMoe
from tests.kernels.fused_moe_stand_in import stand_in
from tests.kernels.kernel_inputs import assert_close, same_bits
from tests.kernels.moe_inputs import HIDDEN, MIDDLE, in_float64, random_experts

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP16 = torch.bfloat16, torch.float16
ROUTED = ("w13", "w2")
ROUTED_FP8 = ("w13", "w13_scale", "w2", "w2_scale")


def reason(method: str = "experts", dtype: torch.dtype = BF16, shape: tuple[int, ...] = (2048, 512)) -> str | None:
    return FlashInferMoe().supports_call(GPU, dtype, Call(method, tokens=0, shape=shape))


def test_it_serves_no_cpu_and_not_the_deterministic_mode() -> None:
    assert FlashInferMoe().supports(CPU, BF16) is not None
    with deterministic():
        why = reason_to_decline(FlashInferMoe(), GPU, BF16)
    assert why == "is not batch invariant, as the deterministic mode requires"


def test_it_serves_the_published_model_on_each_gpu_that_has_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    served = {}
    for capability in ((9, 0), (10, 0), (10, 1), (10, 3), (11, 0), (12, 0), (12, 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        served[capability] = [reason(method) for method in ("experts", "experts_fp8")]
    assert served.pop((9, 0)) == [None, None]
    assert served.pop((10, 1))[0] == "has no experts for compute capability 10.1"
    for capability, (unquantized, fp8) in served.items():
        assert unquantized is None
        assert fp8 == f"takes block-wise FP8 on compute capability 9.0, got {capability[0]}.{capability[1]}"


def test_what_the_kernel_does_not_take_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    for ranks in (1, 2, 4, 8):
        assert reason(dtype=FP16, shape=(2048, 512 // ranks)) is None
    assert reason(shape=(2048, 20)) == "needs sizes that are multiples of 8, got 2048, 20"
    assert reason("experts_fp8", shape=(64,)) == "needs sizes that are multiples of 128, got 64"
    assert reason("experts_fp8", FP16) == "takes block-wise FP8 with activations in torch.bfloat16, got torch.float16"
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert reason("experts_fp8") == "takes block-wise FP8 with CUDA 12.8 and more, got 12.6"
    assert reason() is None


def weights_of(arguments: dict[str, Any], names: tuple[str, ...]) -> list[Tensor]:
    return [arguments[name].clone() for name in names]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_packed_experts_agree_with_float64_and_unpacked_have_their_bits_again(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    arguments = random_experts(tokens, dtype)
    with force_backend("reference"):
        truth = experts(**in_float64(arguments))
    weights = weights_of(arguments, ROUTED)
    # As engines hand them on: a slice of wider rows, and indices in int64 through a map.
    given = arguments | {
        "x": torch.cat([arguments["x"]] * 2, dim=1)[:, :HIDDEN],
        "topk_ids": arguments["topk_ids"].long(),
    }
    with force_backend("moe=flashinfer"):
        assert pack_experts_(*weights)
        assert same_bits(weights[0][:, MIDDLE:], arguments["w13"][:, :MIDDLE])
        out = experts(**given | dict(zip(ROUTED, weights, strict=True)), packed=True)
        assert out.dtype == dtype
        assert_close(out, truth, {torch.float32: HIDDEN + MIDDLE, dtype: 3})
        unpack_experts_(*weights)
    for name, weight in zip(ROUTED, weights, strict=True):
        assert same_bits(weight, arguments[name])


def whole_blocks(tokens: int) -> dict[str, Any]:
    """Arguments of :func:`experts_fp8` with sizes in whole blocks."""
    count, hidden, middle = 3, 256, 128

    def weight(*shape: int) -> tuple[Tensor, Tensor]:
        blocks = (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
        return (torch.randn(shape) * 100).to(torch.float8_e4m3fn), torch.rand(blocks) * 0.02 * shape[-1] ** -0.5

    values = (*weight(count, 2 * middle, hidden), *weight(count, hidden, middle))
    choice = topk_softmax(torch.randn(tokens, count), 2, renormalize=True)
    arguments = {"x": torch.randn(tokens, hidden).to(BF16), **dict(zip(ROUTED_FP8, values, strict=True))}
    return arguments | dict(zip(("topk_weights", "topk_ids"), choice, strict=True))


def test_packed_experts_in_fp8_have_the_bits_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    arguments = whole_blocks(5)
    with force_backend("reference"):
        expected = experts_fp8(**arguments)
    weights = weights_of(arguments, ROUTED_FP8)
    with force_backend("moe=flashinfer"):
        assert pack_experts_fp8_(*weights)
        assert same_bits(weights[1][:, 0], arguments["w13_scale"][:, 1])
        out = experts_fp8(**arguments | dict(zip(ROUTED_FP8, weights, strict=True)), packed=True)
        # The stand-in quantizes as the reference does.
        assert same_bits(out, expected)
        unpack_experts_fp8_(*weights)
    for name, weight in zip(ROUTED_FP8, weights, strict=True):
        assert same_bits(weight.view(torch.uint8), arguments[name].view(torch.uint8))


def test_weights_that_it_does_not_serve_stay_and_the_error_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    w13, w2 = torch.randn(2, 40, 64).to(BF16), torch.randn(2, 64, 20).to(BF16)
    before = w13.clone()
    with force_backend("moe=flashinfer"):
        with pytest.raises(BackendError, match=r"flashinfer does not serve moe\.experts .*: needs sizes that are mult"):
            pack_experts_(w13, w2)
        assert not pack_experts_(torch.randn(2, 64, 32).to(BF16).transpose(1, 2), torch.randn(2, 64, 16).to(BF16))
    assert same_bits(w13, before)


def test_packed_weights_are_read_by_no_other_backend() -> None:
    arguments, fp8 = random_experts(3, BF16, shared=True), whole_blocks(3)
    with force_backend("moe=reference"):
        with pytest.raises(BackendError, match=r"^packed: backend reference"):
            experts_fp8(**fp8, packed=True)
        with pytest.raises(BackendError, match=r"^packed: backend reference"):
            experts(**arguments, packed=True)


@pytest.mark.parametrize(
    ("given", "name"), [({"quantize_activations": False}, "quantize_activations"), ({"shared": True}, "shared")]
)
def test_what_flashinfer_does_not_compute_is_refused_by_name(
    given: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    fp8 = whole_blocks(3)
    if "shared" in given:
        given = {"shared": (*(fp8[name][0] for name in ROUTED_FP8), torch.zeros(256, dtype=BF16))}
    with force_backend("moe=flashinfer"), pytest.raises(BackendError, match=f"^{name}: backend flashinfer"):
        experts_fp8(**fp8, packed=True, **given)


@pytest.mark.gpu
@pytest.mark.parametrize("quantized", [False, True], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_packed_experts_agree_with_float64_on_a_gpu(tokens: int, quantized: bool) -> None:
    (backend,) = (each for each in OPERATIONS["moe"].backends if each.name == "flashinfer")
    method = "experts_fp8" if quantized else "experts"
    why = backend.supports(GPU, BF16) or backend.supports_call(GPU, BF16, Call(method, tokens, (256, 128)))
    if why is not None:
        pytest.skip(f"flashinfer: {why}")
    arguments = whole_blocks(tokens) if quantized else random_experts(tokens, BF16)
    run, names = (experts_fp8, ROUTED_FP8) if quantized else (experts, ROUTED)
    with force_backend("reference"):
        truth = run(**in_float64(arguments))
    given = {name: value.to(GPU) for name, value in arguments.items()}
    with force_backend("moe=flashinfer"):
        assert (pack_experts_fp8_ if quantized else pack_experts_)(*(given[name] for name in names))
        out = run(**given, packed=True)
    # In FP8 a difference of one rounding in bfloat16 makes some of the activations neighbouring e4m3 numbers.
    expected: dict[torch.dtype, float] = {torch.float32: HIDDEN + MIDDLE, BF16: 3}
    if quantized:
        expected = {torch.float32: 384, BF16: 2, torch.float8_e4m3fn: 2**-4}
    assert_close(out.cpu(), truth, expected)
