"""The experts in Triton, interpreted: numbers, promises, and no lane out of bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from qnext_kernels import experts, experts_fp8, experts_int4, force_backend, topk_softmax, triton_support
from qnext_kernels.dispatch import BackendError, deterministic
from qnext_kernels.fp8 import quantize_groups
from qnext_kernels.moe import triton as moe_triton
from qnext_kernels.moe import triton_experts, triton_fp8
from qnext_kernels.moe.configurations import Configuration, Few, Product
from qnext_kernels.moe.triton import TritonMoe
from qnext_kernels.moe.triton_align import COMPARED, FEW_PAIRS, STEP, Blocks, align, most_blocks
from tests.kernels.kernel_inputs import assert_close, same_bits
from tests.kernels.moe_inputs import (
    EXPERTS,
    HIDDEN,
    MIDDLE,
    SHARED_MIDDLE,
    TOP_K,
    fp8_roundings,
    in_float64,
    random_experts,
    random_fp8,
    random_int4,
    rows_of,
)
from tests.kernels.test_moe import randomize, transformers_config
from tests.kernels.triton.interpreter import shuffled_programs

pytestmark = pytest.mark.usefixtures("interpreter")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def ours(arguments: dict[str, Any]) -> Tensor:
    if "shared" in arguments:
        return TritonMoe().experts_with_shared(**arguments)
    return TritonMoe().experts(**arguments)


def ours_fp8(arguments: dict[str, Any]) -> Tensor:
    return TritonMoe().experts_scaled(**({"shared": None, "quantize": True} | arguments))


def truth_of(arguments: dict[str, Any]) -> Tensor:
    with force_backend("reference"):
        return (experts_fp8 if "w13_scale" in arguments else experts)(**in_float64(arguments))


def sorted_slowly(ids: list[int], num_experts: int, rows: int) -> tuple[list[int], list[list[int]]]:
    """The order and the table of :class:`triton_align.Blocks`, by their definition."""
    order, table = [], []
    for expert in range(num_experts):
        mine = [pair for pair, chosen in enumerate(ids) if chosen == expert]
        end = len(order) + len(mine)
        table += [[expert, first, min(first + rows, end)] for first in range(len(order), end, rows)]
        order += mine
    return order, table


def blocks_of(blocks: Blocks) -> list[list[int]]:
    """The columns of a table that are blocks."""
    return [column for column in blocks.table.T.tolist() if column[0] >= 0]


# Around the pairs of a program, those that are compared and the steps of a program, and one column of counts unused.
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "rows"),
    [
        (1, 512, 10, 16),
        (2, 3, 1, 16),
        (7, 512, 10, 16),
        (COMPARED, 5, 1, 16),
        (COMPARED + 1, 64, 1, 32),
        (FEW_PAIRS // 8, 33, 8, 64),
        (FEW_PAIRS // 8 + 1, 33, 8, 64),
        (9 * STEP, 5, 1, 16),
        (300, 512, 10, 16),
    ],
)
def test_pairs_are_sorted_by_expert_in_the_order_of_tokens(
    tokens: int, num_experts: int, top_k: int, rows: int
) -> None:
    # Ids beyond the experts, which no host can see on a GPU, are left out as −1 is.
    ids = torch.randint(-1, num_experts + 1, (tokens, top_k), dtype=torch.int32)
    order, table = sorted_slowly(ids.flatten().tolist(), num_experts, rows)
    with shuffled_programs(seed=tokens):
        blocks = align(ids, num_experts, rows)
    assert blocks.order[: len(order)].tolist() == order
    assert blocks_of(blocks) == table


@pytest.mark.parametrize("chosen", [0, 4, -1])
@pytest.mark.parametrize("pairs", [700, FEW_PAIRS + 60])
def test_all_pairs_on_one_expert_or_on_none_are_sorted(pairs: int, chosen: int) -> None:
    ids = torch.full((pairs, 1), chosen, dtype=torch.int64)
    order, table = sorted_slowly(ids.flatten().tolist(), 5, 16)
    blocks = align(ids, 5, 16)
    assert blocks.order[: len(order)].tolist() == order
    assert blocks_of(blocks) == table


def test_there_is_room_for_the_blocks_of_any_choice_and_for_no_more() -> None:
    for pairs, num_experts, rows in ((1025, 512, 16), (1100, 7, 16), (5000, 512, 64), (2000, 2000, 16)):
        # The most blocks: as many experts as there can be have one row in their last block.
        partly = min(pairs, num_experts)
        counts = [1] * partly
        counts[0] += pairs - partly
        assert most_blocks(pairs, num_experts, rows) == sum(-(-count // rows) for count in counts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
def test_experts_agree_with_float64(tokens: int, dtype: torch.dtype) -> None:
    arguments = random_experts(tokens, dtype)
    out = ours(arguments)
    assert out.dtype == dtype
    # What comes out of SwiGLU, every expert's result and the sum are rounded.
    assert_close(out, truth_of(arguments), {torch.float32: HIDDEN + MIDDLE, dtype: 3})


# Around the rows of a block, which an expert that all tokens choose fills; of the others nobody chooses any.
@pytest.mark.parametrize("tokens", [15, 16, 33])
def test_all_tokens_may_choose_one_expert_and_others_are_not_read(tokens: int) -> None:
    arguments = random_experts(tokens, torch.bfloat16)
    arguments |= {"topk_ids": torch.full((tokens, 1), 4), "topk_weights": torch.rand(tokens, 1)}
    idle = torch.arange(EXPERTS) != 4
    for name in ("w13", "w2"):
        arguments[name][idle] = torch.nan
    truth = truth_of(arguments)
    assert_close(ours(arguments), truth, {torch.float32: HIDDEN + MIDDLE, torch.bfloat16: 3})


def test_a_token_without_experts_of_this_rank_is_zero_whatever_its_weights_are() -> None:
    arguments = random_experts(4, torch.bfloat16)
    arguments["topk_ids"][:] = torch.tensor([[0, 1, 2], [-1, -1, -1], [3, -1, 4], [-1, -1, -1]])
    arguments["topk_weights"][arguments["topk_ids"] < 0] = torch.nan
    out = ours(arguments)
    assert not out[[1, 3]].any()
    assert out[[0, 2]].isfinite().all()
    alone = ours(rows_of(arguments, slice(1, 2)))
    assert not alone.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 18])
def test_experts_with_a_shared_one_agree_with_float64(tokens: int, dtype: torch.dtype) -> None:
    arguments = random_experts(tokens, dtype, shared=True)
    expected = {torch.float32: 2 * HIDDEN + MIDDLE + SHARED_MIDDLE, dtype: 5}
    assert_close(ours(arguments), truth_of(arguments), expected)


def test_a_wider_shared_expert_runs_beside_narrower_ones() -> None:
    arguments = random_experts(3, torch.float32, shared=True)
    wide = 2 * MIDDLE
    gate = arguments["shared"][2]
    arguments["shared"] = torch.randn(2 * wide, HIDDEN) * 0.2, torch.randn(HIDDEN, wide) * 0.2, gate
    expected = {torch.float32: 2 * HIDDEN + MIDDLE + wide + 5}
    assert_close(ours(arguments), truth_of(arguments), expected)


def test_a_block_of_transformers_is_one_call() -> None:
    block = randomize(Qwen3NextSparseMoeBlock(transformers_config()))
    x = torch.randn(9, HIDDEN)
    with force_backend("reference"):
        choice = topk_softmax(block.gate(x)[0], TOP_K, True)
    shared = block.shared_expert
    w13 = torch.cat([shared.gate_proj.weight, shared.up_proj.weight])
    extra = w13, shared.down_proj.weight, block.shared_expert_gate.weight[0]
    routed = block.experts
    out = TritonMoe().experts_with_shared(x, routed.gate_up_proj, routed.down_proj, *choice, extra)
    assert_close(out, block(x[None])[0], {torch.float32: 2 * (HIDDEN + MIDDLE)})


@pytest.mark.parametrize("native", [True, False])
def test_activations_are_quantized_as_the_reference_does(native: bool) -> None:
    x = torch.randn(40, 200) * torch.logspace(-6, 6, 40)[:, None]
    x[3] = 0
    x[4, 7:30] = 448
    quantized, scales = triton_fp8.quantize(x[:, 3:].bfloat16(), not native)
    expected, expected_scales = quantize_groups(x[:, 3:].bfloat16())
    assert torch.equal(quantized.float(), expected.float())
    assert same_bits(scales, expected_scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "shared"), [(0, True), (1, False), (1, True), (18, True)])
def test_experts_in_fp8_agree_with_float64_and_have_the_same_bits_with_products_of_e4m3_and_without(
    tokens: int, shared: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = random_fp8(tokens, dtype, shared=shared)
    out = ours_fp8(arguments)
    assert out.dtype == dtype
    assert_close(out, truth_of(arguments), fp8_roundings(arguments))
    with monkeypatch.context() as patch:
        patch.setattr(moe_triton, "current_target", lambda: triton_support.current_target()._replace(e4m3=False))
        assert same_bits(ours_fp8(arguments), out)


@pytest.mark.parametrize(("tokens", "shared"), [(1, True), (3, False), (3, True)])
@pytest.mark.parametrize(
    ("random", "dtype", "few"),
    [
        (random_experts, torch.float32, Few(2, 1, 4, 2)),
        (random_experts, torch.bfloat16, Few(16, 4, 1, 1)),
        (random_fp8, torch.bfloat16, Few(16, 4, 16, 4)),
    ],
)
def test_few_tokens_agree_with_float64_in_two_launches_and_do_not_depend_on_each_other(
    random: Callable[..., dict[str, Any]],
    dtype: torch.dtype,
    few: Few,
    tokens: int,
    shared: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moe_triton, "configuration", lambda *_: few)
    arguments = random(tokens, dtype, shared=shared)
    arguments["topk_ids"][0] = torch.tensor([-1, len(arguments["w2"]), 1])[: arguments["topk_ids"].shape[1]]
    in_fp8 = "w13_scale" in arguments
    run = ours_fp8 if in_fp8 else ours
    with shuffled_programs(seed=tokens):
        out = run(arguments)
    expected = {torch.float32: 2 * HIDDEN + MIDDLE + SHARED_MIDDLE, dtype: 5}
    known = arguments | {"topk_ids": arguments["topk_ids"].where(arguments["topk_ids"] < len(arguments["w2"]), -1)}
    assert_close(out, truth_of(known), fp8_roundings(arguments) if in_fp8 else expected)
    assert same_bits(run(rows_of(arguments, slice(0, 1))), out[:1])


@pytest.mark.parametrize(("run", "random"), [(ours, random_experts), (ours_fp8, random_fp8)], ids=["bfloat16", "fp8"])
def test_weights_may_be_the_left_factor_of_the_products(
    run: Callable[[dict[str, Any]], Tensor],
    random: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = random(18, torch.bfloat16, shared=True)
    product = Product(columns=32, depth=128, warps=4, stages=2, swapped=True)
    monkeypatch.setattr(moe_triton, "configuration", lambda *_: Configuration(16, product, product))
    expected = {torch.float32: 2 * HIDDEN + MIDDLE + SHARED_MIDDLE, torch.bfloat16: 5}
    assert_close(run(arguments), truth_of(arguments), fp8_roundings(arguments) if run is ours_fp8 else expected)


def test_every_e4m3_number_is_decoded_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes % 128 == 127] = 0
    # Every number is the only one in its row of w2, and what is multiplied with it is 1.
    w2 = torch.zeros(1, 256, 16, dtype=torch.uint8)
    w2[0, :, 0] = codes
    results = torch.zeros(1, 16)
    results[0, 0] = 1
    weights = triton_experts.Weights(
        torch.zeros(1, 32, 256, dtype=torch.uint8), w2, torch.ones(1, 2, 2), torch.ones(1, 2, 1)
    )
    x, ids = torch.zeros(1, 256), torch.zeros(1, 1, dtype=torch.int32)
    target = triton_experts.Target(nvidia=True, shared_memory=1 << 20)
    product = triton_experts.Product(columns=32, depth=16, warps=4, stages=1)
    call = triton_experts.Call(
        x,
        weights,
        None,
        torch.ones(1, 1),
        ids,
        triton_experts.Configuration(16, product, product),
        target,
        decode=True,
    )
    out = call.down(results.bfloat16(), torch.ones(1, 1))
    assert torch.equal(out[0], codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(("run", "random"), [(ours, random_experts), (ours_fp8, random_fp8)], ids=["bfloat16", "fp8"])
def test_a_token_does_not_depend_on_the_batch_or_the_order_of_programs(
    run: Callable[[dict[str, Any]], Tensor], random: Callable[..., dict[str, Any]]
) -> None:
    arguments = random(70, torch.bfloat16, shared=True)
    # More than a block of rows for one expert.
    arguments["topk_ids"][:, 0] = 1
    order = torch.randperm(70)
    with deterministic():
        together = run(arguments)
        for some in (slice(0, 1), slice(7, 9), slice(40, 70), slice(69, 70)):
            assert same_bits(run(rows_of(arguments, some)), together[some])
        with shuffled_programs(seed=1):
            permuted = {name: arguments[name][order] for name in ("x", "topk_weights", "topk_ids")}
            assert same_bits(run(arguments | permuted), together[order])


def test_the_same_bits_come_whether_a_token_has_company_or_not_where_blocks_have_as_many_rows() -> None:
    arguments = random_experts(9, torch.float32, shared=True)
    together = ours(arguments)
    assert same_bits(ours(rows_of(arguments, slice(4, 6))), together[4:6])


def test_views_are_read_where_they_lie_and_from_any_alignment() -> None:
    arguments = random_experts(5, torch.bfloat16, shared=True)
    expected = ours(arguments)

    def view(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]

    views = {name: view(arguments[name]) for name in ("x", "w13", "w2", "topk_weights")}
    views["topk_ids"] = arguments["topk_ids"].long().repeat(1, 2)[:, :TOP_K]
    up, down, gate = arguments["shared"]
    assert same_bits(ours(views | {"shared": (view(up), view(down), torch.stack([gate, gate], dim=1)[:, 0])}), expected)


def test_some_of_the_experts_of_a_larger_tensor_are_read_where_they_lie() -> None:
    arguments = random_experts(5, torch.bfloat16)
    padded = {name: torch.cat([arguments[name], arguments[name]], dim=1) for name in ("w13", "w2")}
    sliced = {name: weight[:, : weight.shape[1] // 2] for name, weight in padded.items()}
    assert sliced["w13"].stride(0) == 2 * arguments["w13"].stride(0)
    assert same_bits(ours(arguments | sliced), ours(arguments))
    assert len(arguments["w13"]) == EXPERTS


def test_weights_in_int4_are_refused_by_name() -> None:
    with pytest.raises(BackendError, match=r"^w13: backend triton does not read int4$"):
        experts_int4(**random_int4(3, torch.bfloat16))
