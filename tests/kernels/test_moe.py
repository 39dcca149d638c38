from __future__ import annotations

from typing import TypeVar

import pytest
import torch
from torch import Tensor
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextExperts,
    Qwen3NextSparseMoeBlock,
    Qwen3NextTopKRouter,
)

from qnext_kernels import (
    experts,
    force_backend,
    pack_experts_,
    sigmoid_gate,
    silu_and_mul,
    topk_softmax,
    unpack_experts_,
)
from qnext_kernels.dispatch import BackendError
from tests.kernels.kernel_inputs import DTYPES, NATIVE_BACKENDS, Bad, assert_close, same_bits

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 9, 3, 40, 24


def expert_arguments(tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    weights, ids = topk_softmax(torch.randn(tokens, EXPERTS), TOP_K, renormalize=True)
    return {
        "x": torch.randn(tokens, HIDDEN).to(dtype),
        "w13": (torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) * HIDDEN**-0.5).to(dtype),
        "w2": (torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) * INTERMEDIATE**-0.5).to(dtype),
        "topk_weights": weights,
        "topk_ids": ids,
    }


def in_float64(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return arguments | {name: arguments[name].double() for name in ("x", "w13", "w2")}


def transformers_config() -> Qwen3NextConfig:
    return Qwen3NextConfig(
        hidden_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=INTERMEDIATE,
        shared_expert_intermediate_size=20,
    )


def randomize(module: ModuleT) -> ModuleT:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module.requires_grad_(False)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(512, 10), (9, 9), (4, 1)])
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_topk_softmax_agrees_with_float64(
    backend: str, num_experts: int, top_k: int, dtype: torch.dtype, renormalize: bool
) -> None:
    # Distinct in bfloat16 too, so that the order of the experts is not a matter of ties.
    logits = torch.stack([torch.randperm(num_experts) for _ in range(6)]).sub(num_experts // 2).mul(2.0**-5).to(dtype)
    with force_backend(backend):
        weights, ids = topk_softmax(logits, top_k, renormalize)
    probabilities = torch.softmax(logits.double(), dim=-1)
    truth, truth_ids = probabilities.topk(top_k, dim=-1)
    if renormalize:
        truth = truth / truth.sum(dim=-1, keepdim=True)
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int32
    assert torch.equal(ids.long(), truth_ids)
    assert_close(weights, truth, {torch.float32: num_experts})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_topk_softmax_of_a_token_does_not_depend_on_the_batch(backend: str, dtype: torch.dtype) -> None:
    for num_experts in (512, 37):
        logits = torch.randn(25, num_experts, dtype=dtype)
        order = torch.randperm(25)
        with force_backend(backend):
            together, shuffled = topk_softmax(logits, 10, True), topk_softmax(logits[order], 10, True)
            alone = [topk_softmax(row[None], 10, True) for row in logits]
        for n, whole in enumerate(together):
            assert same_bits(whole, torch.cat([one[n] for one in alone]))
            assert same_bits(whole[order], shuffled[n])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 48), (2, 3, 10), (0, 6)])
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_silu_and_mul_agrees_with_float64_and_rounds_once(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape, dtype=dtype) * 3
    with force_backend(backend):
        out = silu_and_mul(x)
    gate, up = x.double().chunk(2, dim=-1)
    assert out.dtype == dtype
    assert_close(out, torch.nn.functional.silu(gate) * up, {torch.float32: 5})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_silu_and_mul_of_a_row_does_not_depend_on_the_batch(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(25, 66, dtype=dtype)
    with force_backend(backend):
        assert same_bits(silu_and_mul(x), torch.cat([silu_and_mul(row[None]) for row in x]))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_experts_agree_with_float64(backend: str, tokens: int, dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    arguments = expert_arguments(tokens, dtype)
    arguments["topk_ids"] = arguments["topk_ids"].to(ids_dtype)
    arguments["topk_ids"][torch.rand(tokens, TOP_K) < 0.2] = -1
    with force_backend(backend):
        out = experts(**arguments)
    with force_backend("reference"):
        truth = experts(**in_float64(arguments))
    assert out.dtype == dtype
    # The matrix products run in the dtype of the weights: their two results and what lies between are rounded to it.
    assert_close(out, truth, {torch.float32: HIDDEN + INTERMEDIATE, dtype: 3})


# Around the block sizes of the C++ kernel: tokens of an expert, elements of a product, rows and columns at once.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "middle"), [(513, 65), (1041, 130), (130, 520)])
def test_native_experts_are_exact_in_every_block_and_do_not_depend_on_the_batch_or_on_threads(
    hidden: int, middle: int, dtype: torch.dtype
) -> None:
    tokens = 103
    x = torch.randn(tokens, hidden, dtype=dtype)
    w13, w2 = torch.randn(3, 2 * middle, hidden) * hidden**-0.5, torch.randn(3, hidden, middle) * middle**-0.5
    arguments = {"x": x, "w13": w13.to(dtype), "w2": w2.to(dtype)}
    # Every token has expert 0, which so has more than two blocks of tokens; expert 2 has one token.
    ids = torch.tensor([[0, 1]] * (tokens - 1) + [[0, 2]], dtype=torch.int32)
    arguments |= {"topk_weights": torch.rand(tokens, 2), "topk_ids": ids}
    with force_backend("native"):
        out = experts(**arguments)
    with force_backend("reference"):
        truth = experts(**in_float64(arguments))
    assert_close(out, truth, {torch.float32: hidden + middle, dtype: 3})
    threads = torch.get_num_threads()
    for some in (slice(0, 1), slice(7, 9), slice(40, 100), slice(102, 103)):
        part = arguments | {name: arguments[name][some] for name in ("x", "topk_weights", "topk_ids")}
        for count in (1, 2):
            torch.set_num_threads(count)
            with force_backend("native"):
                assert same_bits(experts(**part), out[some])
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "middle"), [(130, 72), (64, 192)])
def test_packed_experts_give_the_bits_of_the_plain_ones(hidden: int, middle: int, dtype: torch.dtype) -> None:
    tokens = 40
    weights, ids = topk_softmax(torch.randn(tokens, EXPERTS), TOP_K, renormalize=True)
    x, w13 = torch.randn(tokens, hidden, dtype=dtype), torch.randn(EXPERTS, 2 * middle, hidden, dtype=dtype)
    w2 = torch.randn(EXPERTS, hidden, middle, dtype=dtype)
    packed = w13.clone(), w2.clone()
    with force_backend("native"):
        assert pack_experts_(*packed)
        for some in (slice(0, 0), slice(0, 1), slice(0, tokens)):
            rest = weights[some], ids[some]
            assert same_bits(experts(x[some], *packed, *rest, packed=True), experts(x[some], w13, w2, *rest))
        unpack_experts_(*packed)
    assert same_bits(packed[0], w13)
    assert same_bits(packed[1], w2)


def test_experts_are_packed_both_or_neither() -> None:
    w13, w2 = torch.randn(2, 256, 64).bfloat16(), torch.randn(2, 64, 129)[:, :, :128].bfloat16()
    odd = torch.randn(2, 64, 127).bfloat16()
    with force_backend("native"):
        assert not pack_experts_(w13, odd)
        before = w13.clone()
        assert pack_experts_(w13, w2)
    assert not same_bits(w13, before)
    with force_backend("cpu"), pytest.raises(BackendError, match=r"^packed: backend cpu"):
        experts(
            torch.ones(1, 64),
            torch.ones(2, 4, 64),
            torch.ones(2, 64, 2),
            torch.ones(1, 1),
            torch.zeros(1, 1).int(),
            True,
        )


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_a_token_without_experts_of_this_rank_is_zero(backend: str) -> None:
    arguments = expert_arguments(4, torch.float32)
    arguments["topk_ids"][1:3] = -1
    with force_backend(backend):
        out = experts(**arguments)
    assert torch.equal(out[1:3], torch.zeros(2, HIDDEN))
    assert (out[[0, 3]] != 0).any(dim=1).all()


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_experts_that_nobody_chose_are_not_read(backend: str) -> None:
    arguments = expert_arguments(4, torch.float32)
    idle = torch.ones(EXPERTS, dtype=torch.bool)
    idle[arguments["topk_ids"].long()] = False
    arguments["topk_ids"][0, 0] = -1
    assert idle.any()
    clean = arguments | {"w13": arguments["w13"].clone(), "w2": arguments["w2"].clone()}
    for name in ("w13", "w2"):
        arguments[name][idle] = float("nan")
    with force_backend(backend):
        assert same_bits(experts(**arguments), experts(**clean))


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_router_and_experts_agree_with_transformers(backend: str, norm_topk_prob: bool) -> None:
    config = transformers_config()
    config.norm_topk_prob = norm_topk_prob
    router, module = randomize(Qwen3NextTopKRouter(config)), randomize(Qwen3NextExperts(config))
    x = torch.randn(33, HIDDEN)
    logits, scores, indices = router(x)
    with force_backend(backend):
        weights, ids = topk_softmax(logits, TOP_K, norm_topk_prob)
        out = experts(x, module.gate_up_proj, module.down_proj, weights, ids)
    assert torch.equal(ids.long(), indices)
    assert_close(weights, scores, {torch.float32: 2 * EXPERTS})
    assert_close(out, module(x, indices, scores), {torch.float32: 2 * (HIDDEN + INTERMEDIATE)})


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_the_operations_compose_to_transformers_sparse_block(backend: str) -> None:
    block = randomize(Qwen3NextSparseMoeBlock(transformers_config()))
    x = torch.randn(33, HIDDEN)
    shared = block.shared_expert
    with force_backend(backend):
        routed = experts(
            x, block.experts.gate_up_proj, block.experts.down_proj, *topk_softmax(block.gate(x)[0], TOP_K, True)
        )
        middle = silu_and_mul(torch.cat([shared.gate_proj(x), shared.up_proj(x)], dim=-1))
        out = routed + sigmoid_gate(shared.down_proj(middle), block.shared_expert_gate(x))
    assert_close(out, block(x[None])[0], {torch.float32: 2 * (HIDDEN + INTERMEDIATE)})


@pytest.mark.parametrize(
    "bad",
    [
        Bad("x", "one dimension", lambda x: x[0], ValueError),
        Bad("x", "integers", lambda x: x.long(), TypeError),
        Bad("w13", "another hidden size", lambda x: x[:, :, :-1], ValueError),
        Bad("w13", "another float dtype", lambda x: x.bfloat16(), TypeError),
        Bad("w2", "of fewer experts", lambda x: x[:-1], ValueError),
        Bad("w2", "another intermediate size", lambda x: x[:, :, :-1], ValueError),
        Bad("w2", "another float dtype", lambda x: x.bfloat16(), TypeError),
        Bad("topk_weights", "of fewer tokens", lambda x: x[:-1], ValueError),
        Bad("topk_weights", "not float32", lambda x: x.double(), TypeError),
        Bad("topk_ids", "fewer than weights", lambda x: x[:, :-1], ValueError),
        Bad("topk_ids", "floats", lambda x: x.float(), TypeError),
        Bad("topk_ids", "beyond the experts", lambda x: x + EXPERTS, IndexError),
        Bad("topk_ids", "below −1", lambda x: x - EXPERTS - 1, IndexError),
    ],
    ids=str,
)
def test_experts_refuse_bad_input_by_name(bad: Bad) -> None:
    arguments = expert_arguments(5, torch.float32)
    with pytest.raises(bad.error, match=f"^{bad.argument}:"):
        experts(**(arguments | {bad.argument: bad.change(arguments[bad.argument])}))


def test_experts_refuse_an_odd_gate_and_up_by_name() -> None:
    arguments = expert_arguments(5, torch.float32)
    odd = {"w13": torch.ones(EXPERTS, 5, HIDDEN), "w2": torch.ones(EXPERTS, HIDDEN, 2)}
    with pytest.raises(ValueError, match=r"^w13:"):
        experts(**(arguments | odd))


@pytest.mark.parametrize(
    ("logits", "top_k", "error", "argument"),
    [
        (torch.ones(4), 1, ValueError, "router_logits"),
        (torch.ones(4, 8, dtype=torch.int64), 1, TypeError, "router_logits"),
        (torch.ones(4, 8), 0, ValueError, "top_k"),
        (torch.ones(4, 8), 9, ValueError, "top_k"),
    ],
)
def test_topk_softmax_refuses_bad_input_by_name(
    logits: Tensor, top_k: int, error: type[Exception], argument: str
) -> None:
    with pytest.raises(error, match=f"^{argument}:"):
        topk_softmax(logits, top_k, renormalize=True)


@pytest.mark.parametrize(
    ("x", "error"), [(torch.ones(4, 7), ValueError), (torch.ones(4, 8, dtype=torch.int64), TypeError)]
)
def test_silu_and_mul_refuses_bad_input_by_name(x: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^x:"):
        silu_and_mul(x)
