"""The experts compile for every GPU we name, at the shapes of the published model, as the host code launches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from qnext_kernels.dispatch import deterministic
from qnext_kernels.moe import triton as moe_triton
from qnext_kernels.moe.configurations import Shape, file_of, load, rule
from qnext_kernels.moe.triton import TritonMoe
from qnext_kernels.moe.triton_align import align
from qnext_kernels.triton_support import Target, current_target
from tests.kernels.triton.ahead_of_time import SHARED_MEMORY, TARGETS, Compiled, compiling_for

EXPERTS, TOP_K, HIDDEN, MIDDLE = 512, 10, 2048, 512
FEW, DECODE, SOME, PREFILL = 4, 48, 2048, 65536
PRODUCTS = ("up_kernel", "down_kernel")
FEW_PRODUCTS = ["few_up_kernel", "few_down_kernel"]


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def choice(tokens: int) -> tuple[Tensor, Tensor]:
    return empty(tokens, TOP_K, dtype=torch.float32), empty(tokens, TOP_K, dtype=torch.int32)


def compile_experts(
    target: str, tokens: int, ranks: int = 1, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Compiled]:
    """What a call with the shared expert launches on a rank, by name."""
    middle = MIDDLE // ranks
    w13, w2 = empty(EXPERTS, 2 * middle, HIDDEN, dtype=dtype), empty(EXPERTS, HIDDEN, middle, dtype=dtype)
    shared = w13[0], w2[0], empty(HIDDEN, dtype=dtype)
    with compiling_for(target) as compiled:
        TritonMoe().experts_with_shared(empty(tokens, HIDDEN, dtype=dtype), w13, w2, *choice(tokens), shared)
    return {kernel.name: kernel for kernel in compiled}


def compile_fp8(target: str, tokens: int, ranks: int = 1) -> dict[str, Compiled]:
    middle, groups = MIDDLE // ranks, -(-MIDDLE // ranks // 128)

    def weight(*shape: int) -> Tensor:
        return empty(EXPERTS, *shape, dtype=torch.float8_e4m3fn)

    def scale(*shape: int) -> Tensor:
        return empty(EXPERTS, *shape, dtype=torch.float32)

    weights = weight(2 * middle, HIDDEN), scale(2 * groups, HIDDEN // 128)
    weights += weight(HIDDEN, middle), scale(HIDDEN // 128, groups)
    shared = *(tensor[0] for tensor in weights), empty(HIDDEN, dtype=torch.bfloat16)
    with compiling_for(target) as compiled:
        TritonMoe().experts_scaled(empty(tokens, HIDDEN, dtype=torch.bfloat16), *weights, *choice(tokens), shared, True)
    return {kernel.name: kernel for kernel in compiled}


@pytest.mark.parametrize("tokens", [FEW, DECODE, PREFILL])
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spilling_and_fits_into_shared_memory(target: str, tokens: int) -> None:
    compiled = compile_experts(target, tokens)
    sorting = ["compare_kernel"] if tokens == DECODE else ["count_kernel", "scan_kernel", "align_kernel"]
    assert list(compiled) == (FEW_PRODUCTS if tokens == FEW else [*sorting, *PRODUCTS, "sum_kernel"])
    for kernel in compiled.values():
        assert kernel.spilled == 0, kernel[:-1]
        assert kernel.shared <= SHARED_MEMORY[target], kernel[:-1]


def expect_no_spills(target: str, compiled: dict[str, Compiled]) -> None:
    """In FP8: there the assembler of Triton 3.6 stops at 80 registers for sm_90 and keeps 8 bytes in memory."""
    for name in FEW_PRODUCTS if FEW_PRODUCTS[0] in compiled else PRODUCTS:
        assert compiled[name].spilled <= 8, compiled[name][:-2]
        assert compiled[name].shared <= SHARED_MEMORY[target], compiled[name][:-2]


# The two that decode e4m3 have the least registers left in larger blocks.
@pytest.mark.parametrize(
    ("target", "tokens"),
    [*((target, tokens) for target in TARGETS for tokens in (FEW, DECODE)), ("sm_80", SOME), ("gfx942", SOME)],
)
def test_fp8_compiles_with_products_of_e4m3_and_without(target: str, tokens: int) -> None:
    compiled = compile_fp8(target, tokens)
    sorting = ["count_kernel", "scan_kernel", "align_kernel"] if tokens == SOME else ["compare_kernel"]
    many = [*sorting, "quantize_kernel", *PRODUCTS, "sum_kernel"]
    assert list(compiled) == (FEW_PRODUCTS if tokens == FEW else many)
    expect_no_spills(target, compiled)


def every_configuration(target: str, weights: str, ranks: int) -> list[int]:
    """Numbers of tokens, one for every configuration that the rule chooses, and few, which are sorted by no kernel."""
    with compiling_for(target):
        gpu = current_target()
    shape = Shape(EXPERTS, HIDDEN, MIDDLE // ranks, TOP_K, weights)
    first = {rule(shape, tokens, gpu): tokens for tokens in range(PREFILL // 4, FEW, -1)}
    return [1, *first.values()]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("target", TARGETS)
def test_no_configuration_that_the_rule_chooses_spills(target: str, ranks: int) -> None:
    for tokens in every_configuration(target, "bfloat16", ranks):
        expect_no_spills(target, compile_experts(target, tokens, ranks))
    # FP8 is served where a rank has whole blocks.
    for tokens in every_configuration(target, "float8_e4m3fn", ranks) if MIDDLE // ranks % 128 == 0 else ():
        expect_no_spills(target, compile_fp8(target, tokens, ranks))


RANKS = [(1, 1), (1, SOME), (2, DECODE), (2, PREFILL), (4, SOME), (4, PREFILL), (8, 1), (8, DECODE), (8, PREFILL)]


@pytest.mark.parametrize(("ranks", "tokens"), RANKS)
def test_every_rank_of_tensor_parallelism_has_products_without_spills(ranks: int, tokens: int) -> None:
    compiled = compile_experts("sm_90", tokens, ranks)
    if tokens == 1:
        assert list(compiled) == FEW_PRODUCTS
        for kernel in compiled.values():
            assert kernel.spilled == 0, kernel[:-1]
            assert "ld.global.v4.b32" in kernel.assembly
        return
    for name in PRODUCTS:
        kernel = compiled[name]
        assert kernel.spilled == 0, kernel[:-1]
        assert kernel.shared <= SHARED_MEMORY["sm_90"], kernel[:-1]
        # Every thread loads 16 bytes of weights at once.
        assert "cp.async.cg.shared.global" in kernel.assembly or "ld.global.v4.b32" in kernel.assembly
        assert "wgmma.mma_async" in kernel.assembly
    assert "cp.async.cg.shared.global" in compiled["up_kernel"].assembly


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_choices_among_the_experts_of_a_rank_are_sorted_without_spills(ranks: int) -> None:
    with compiling_for("sm_90") as compiled:
        align(empty(SOME, TOP_K, dtype=torch.int32), EXPERTS // ranks, rows=64)
    assert [(kernel.name, kernel.spilled) for kernel in compiled] == [
        (name, 0) for name in ("count_kernel", "scan_kernel", "align_kernel")
    ]


@pytest.mark.parametrize(("ranks", "tokens"), [(1, SOME), (1, PREFILL), (8, SOME)])
def test_products_in_fp8_run_on_tensor_cores_without_spills(ranks: int, tokens: int) -> None:
    compiled = compile_fp8("sm_90", tokens, ranks)
    assert list(compiled) == ["count_kernel", "scan_kernel", "align_kernel", "quantize_kernel", *PRODUCTS, "sum_kernel"]
    for name in PRODUCTS:
        assert compiled[name].spilled == 0
        assert "wgmma.mma_async" in compiled[name].assembly
        assert ".f32.e4m3.e4m3" in compiled[name].assembly


@pytest.mark.parametrize(
    ("target", "dtype"), [("sm_90", torch.float16), ("sm_90", torch.float32), ("gfx942", torch.float32)]
)
def test_other_dtypes_compile_and_fit_into_shared_memory(target: str, dtype: torch.dtype) -> None:
    compiled = compile_experts(target, SOME, dtype=dtype)
    assert all(kernel.spilled == 0 and kernel.shared <= SHARED_MEMORY[target] for kernel in compiled.values())


@pytest.mark.parametrize("compile_call", [compile_experts, compile_fp8])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_deterministic_mode_runs_the_same_kernels_whatever_the_number_of_tokens(
    target: str, compile_call: Callable[[str, int], dict[str, Compiled]]
) -> None:
    """So that no bit depends on how two instructions that multiply other shapes add up their products."""
    with deterministic():
        first, *others = (compile_call(target, tokens) for tokens in (1, DECODE, SOME + 1, PREFILL))
    sorting = {"compare_kernel", "align_kernel", "count_kernel", "scan_kernel"}
    names = set(first) - sorting
    assert names >= {*PRODUCTS, "sum_kernel"}
    for kernels in others:
        assert set(kernels) - sorting == names
        assert all(kernels[name].assembly == first[name].assembly for name in names)


@pytest.mark.parametrize("compile_call", [compile_experts, compile_fp8])
def test_experts_are_configured_for_the_gpu_that_they_lie_on(
    compile_call: Callable[[str, int], dict[str, Compiled]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one may be current where they are called."""
    devices: list[torch.device] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        devices.append(x.device)
        yield
        devices.pop()

    def target_of_tensors() -> Target:
        assert devices
        return current_target()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(moe_triton, "current_target", target_of_tensors)
    assert set(FEW_PRODUCTS) <= set(compile_call("sm_90", FEW))


def test_a_router_runs_the_same_kernel_whatever_the_number_of_tokens() -> None:
    with compiling_for("sm_90") as compiled:
        for tokens in (1, DECODE, SOME + 1):
            TritonMoe().topk_softmax(empty(tokens, EXPERTS, dtype=torch.bfloat16), TOP_K, True)
    assert [kernel.name for kernel in compiled] == ["topk_softmax_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", load(file_of("NVIDIA H200")), ids=lambda shape: f"{shape.weights}-{shape.middle}")
def test_no_configuration_that_was_measured_spills(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_them = compile_fp8 if shape.itemsize == 1 else compile_experts
    for config in set(load(file_of("NVIDIA H200"))[shape].values()):
        monkeypatch.setattr(moe_triton, "configuration", lambda *_, config=config: config)
        expect_no_spills("sm_90", compile_them("sm_90", SOME, MIDDLE // shape.middle))
