"""The calls before and behind a token mixer, against their parts one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext_kernels import (
    ExpertsWeights,
    LinearWeight,
    experts,
    experts_fp8,
    experts_int4,
    force_backend,
    linear,
    linear_norm_experts,
    norm_heads,
    norm_linears,
    pack_experts_,
    pack_experts_fp8_,
    pack_experts_int4_,
    pack_weight_,
    qk_norm_rope_gate,
    rms_norm,
    sigmoid_gate,
    topk_softmax,
)
from qnext_kernels.decoder_layer import native
from qnext_kernels.fp8 import FP8
from qnext_kernels.integers import GROUPED, INT4, INT8
from tests.kernels.fp8_inputs import experts_in_fp8, linear_in_fp8
from tests.kernels.integer_inputs import experts_in_int4, linear_in_integers
from tests.kernels.kernel_inputs import DTYPES, assert_close, same_bits

# All columns are whole groups of int4.
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, ROTARY, POSITIONS = 96, 4, 2, 16, 8, 50
EXPERTS, TOP_K, MIDDLE, SHARED_MIDDLE, EPS = 9, 3, 32, 64, 1e-6
QKV = 2 * (HEADS + KV_HEADS) * HEAD_DIM
TOKENS = [0, 1, 3, 17]
NAMES = ("norm_linears", "norm_heads", "linear_norm_experts")


def weight(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype)


def projection(rows: int, k: int, dtype: torch.dtype, *, bias: bool = False) -> LinearWeight:
    return LinearWeight(weight(rows, k, dtype=dtype), torch.randn(rows).to(dtype) if bias else None)


def normed_tokens(tokens: int, dtype: torch.dtype, *, residual: bool) -> dict[str, Any]:
    # Of rows wider than those that are read, as a slice of a projection has them.
    x = torch.randn(tokens, HIDDEN + 8).to(dtype)[:, :HIDDEN]
    total = torch.randn(tokens, HIDDEN).to(dtype) if residual else None
    return {"x": x, "residual": total, "norm_weight": torch.randn(HIDDEN) * 0.1, "eps": EPS}


def of_linears(tokens: int, dtype: torch.dtype, *, residual: bool = True, bias: bool = False) -> dict[str, Any]:
    both = {"first": projection(200, HIDDEN, dtype, bias=bias), "second": projection(8, HIDDEN, dtype)}
    return normed_tokens(tokens, dtype, residual=residual) | both


def of_heads(tokens: int, dtype: torch.dtype, *, residual: bool = True, bias: bool = False) -> dict[str, Any]:
    return normed_tokens(tokens, dtype, residual=residual) | {
        "qkv": projection(QKV, HIDDEN, dtype, bias=bias),
        "positions": torch.randint(0, POSITIONS, (tokens,)),
        "q_weight": torch.randn(HEAD_DIM).to(dtype) * 0.1,
        "k_weight": torch.randn(HEAD_DIM).to(dtype) * 0.1,
        "cos_sin": torch.randn(POSITIONS, ROTARY),
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
    }


def of_experts(tokens: int, dtype: torch.dtype, *, residual: bool = True, bias: bool = False) -> dict[str, Any]:
    """``residual`` False: without an output gate and a shared expert."""
    width = HEADS * HEAD_DIM
    shared = None
    if residual:
        w13, w2 = weight(2 * SHARED_MIDDLE, HIDDEN, dtype=dtype), weight(HIDDEN, SHARED_MIDDLE, dtype=dtype)
        shared = w13, w2, weight(HIDDEN, dtype=dtype)
    w13, w2 = weight(EXPERTS, 2 * MIDDLE, HIDDEN, dtype=dtype), weight(EXPERTS, HIDDEN, MIDDLE, dtype=dtype)
    return {
        "x": torch.randn(tokens, width).to(dtype),
        "gate": torch.randn(tokens, width).to(dtype) if residual else None,
        "out_proj": projection(HIDDEN, width, dtype, bias=bias),
        "residual": torch.randn(tokens, HIDDEN).to(dtype),
        "norm_weight": torch.randn(HIDDEN) * 0.1,
        "eps": EPS,
        "router": projection(EXPERTS, HIDDEN, dtype),
        "moe": ExpertsWeights(w13, w2, False, shared),
        "top_k": TOP_K,
        "renormalize": residual,
    }


CALLS: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    "norm_linears": (norm_linears, of_linears),
    "norm_heads": (norm_heads, of_heads),
    "linear_norm_experts": (linear_norm_experts, of_experts),
}


def one_by_one(name: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The parts, called as the model would."""
    given = dict(arguments)
    if name == "linear_norm_experts":
        x, gate, moe = given["x"], given["gate"], given["moe"]
        projected = linear(x if gate is None else sigmoid_gate(x, gate), *given["out_proj"])
        normed, total = rms_norm(projected, given["norm_weight"], EPS, given["residual"])
        choice = topk_softmax(linear(normed, *given["router"]), given["top_k"], given["renormalize"])
        if moe.scales is not None:
            weights = moe.w13, moe.scales[0], moe.w2, moe.scales[1]
            if moe.w13.dtype == INT4:
                return experts_int4(normed, *weights, *choice, moe.packed, moe.shared), total
            return experts_fp8(normed, *weights, *choice, moe.packed, moe.shared, quantize_activations=False), total
        return experts(normed, moe.w13, moe.w2, *choice, moe.packed, moe.shared), total
    normed, total = rms_norm(given.pop("x"), given.pop("norm_weight"), given.pop("eps"), given.pop("residual"))
    if name == "norm_linears":
        return linear(normed, *given["first"]), linear(normed, *given["second"]), total
    return (*qk_norm_rope_gate(linear(normed, *given.pop("qkv")), eps=EPS, **given), total)


def packed(arguments: dict[str, Any]) -> dict[str, Any]:
    """With all weights packed in place."""
    given = dict(arguments)
    for name, value in given.items():
        if isinstance(value, LinearWeight):
            scale = value.scale if value.weight.dtype in GROUPED else None
            given[name] = value._replace(packed=pack_weight_(value.weight, scale))
            assert given[name].packed
        elif isinstance(value, ExpertsWeights):
            given[name] = value._replace(packed=pack(value))
            assert given[name].packed
    return given


def pack(moe: ExpertsWeights) -> bool:
    shared = None if moe.shared is None else moe.shared[:-1]
    if moe.scales is None:
        return pack_experts_(moe.w13, moe.w2, shared)
    weights = moe.w13, moe.scales[0], moe.w2, moe.scales[1]
    if moe.w13.dtype == INT4:
        return pack_experts_int4_(*weights, shared)
    return pack_experts_fp8_(*weights, None if shared is None else shared[::2])


STORED: dict[str, tuple[Callable[[LinearWeight], LinearWeight], Callable[[ExpertsWeights], ExpertsWeights]]] = {
    "plain": (lambda linear: linear, lambda moe: moe),
    "fp8": (linear_in_fp8, experts_in_fp8),
    "int4": (lambda linear: linear_in_integers(linear, INT4), experts_in_int4),
    "int8": (lambda linear: linear_in_integers(linear, INT8), lambda moe: experts_in_int4(moe, shared=INT8)),
}
"""How weights are stored, and what turns linears and experts into that; in int8 beside routed experts in int4."""


def stored_as(stored: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """With those weights quantized that checkpoints have so: all but the router and the small projection."""
    of_linear, of_experts = STORED[stored]
    convert = {"first": of_linear, "qkv": of_linear, "out_proj": of_linear, "moe": of_experts}
    return {name: convert[name](value) if name in convert else value for name, value in arguments.items()}


def all_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return len(ours) == len(theirs) and all(map(same_bits, ours, theirs))


def refuse(*_: object) -> None:
    raise AssertionError("the parts are called one by one")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", NAMES)
def test_one_call_has_the_bits_of_its_parts(
    name: str, stored: str, tokens: int, dtype: torch.dtype, residual: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, inputs = CALLS[name]
    arguments = stored_as(stored, inputs(tokens, dtype, residual=residual, bias=bias))
    theirs = one_by_one(name, arguments)
    for part in ("linear", "rms_norm", "experts", "experts_fp8", "experts_int4", "qk_norm_rope_gate"):
        monkeypatch.setattr(f"qnext_kernels.decoder_layer.{part}", refuse)
    assert all_same(call(**arguments), theirs)
    assert all_same(call(**packed(arguments)), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", NAMES)
def test_calls_agree_with_float64(name: str, stored: str, dtype: torch.dtype) -> None:
    call, inputs = CALLS[name]
    # Every expert is chosen: which one a rounding would change is not asked here.
    arguments = inputs(5, dtype) | ({"top_k": EXPERTS} if name == "linear_norm_experts" else {})
    arguments = stored_as(stored, arguments)
    with force_backend("reference"):
        truth = call(**in_float64(arguments))
    # Sums of HIDDEN in each of up to three products behind each other, and up to six results that are rounded between.
    for ours, exact in zip(call(**arguments), truth, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, exact, {torch.float32: 6 * HIDDEN, dtype: 12})


def in_float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() and value.dtype != FP8 else value
    if isinstance(value, dict):
        return {name: in_float64(each) for name, each in value.items()}
    if isinstance(value, LinearWeight) and value.weight.dtype == FP8:
        return value._replace(bias=in_float64(value.bias))
    if isinstance(value, ExpertsWeights) and value.w13.dtype == FP8:
        shared = value.shared
        return value if shared is None else value._replace(shared=(*shared[:-1], in_float64(shared[-1])))
    if isinstance(value, LinearWeight | ExpertsWeights):
        return type(value)(*map(in_float64, value))
    return tuple(map(in_float64, value)) if isinstance(value, tuple) else value


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_threads_or_on_the_batch(name: str) -> None:
    call, inputs = CALLS[name]
    arguments = inputs(600, torch.bfloat16)
    whole = call(**arguments)
    torch.set_num_threads(1)
    assert all_same(call(**arguments), whole)
    rows = slice(7, 9)
    part = {key: value[rows] if key in PER_TOKEN and value is not None else value for key, value in arguments.items()}
    assert all_same(call(**part), tuple(result[rows] for result in whole))


PER_TOKEN = ("x", "residual", "gate", "positions")


@pytest.mark.parametrize("name", NAMES)
def test_what_the_kernel_does_not_read_is_computed_by_the_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, inputs = CALLS[name]
    arguments = inputs(3, torch.float32)
    arguments["norm_weight"] = arguments["norm_weight"].double()
    theirs = one_by_one(name, arguments)
    monkeypatch.setattr(native, name, refuse)
    assert all_same(call(**arguments), theirs)
    with force_backend("cpu"):
        assert all_same(call(**inputs_with(arguments, torch.float32)), one_by_one(name, arguments))


def inputs_with(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return arguments | {"norm_weight": arguments["norm_weight"].to(dtype)}


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_sees_one_operator(name: str) -> None:
    call, inputs = CALLS[name]
    arguments = inputs(3, torch.bfloat16)
    seen = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes if str(node.target).startswith("qnext."))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    assert all_same(compiled(**arguments), call(**arguments))
    assert seen == [f"qnext.{name}.default"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("norm_linears", {"residual": torch.zeros(3, HIDDEN + 1)}, "residual: expected shape"),
        ("norm_linears", {"first": LinearWeight(torch.zeros(4, HIDDEN - 8))}, "weight: expected shape"),
        ("norm_heads", {"positions": torch.tensor([0, 1])}, "positions: expected shape"),
        ("norm_heads", {"positions": torch.tensor([0, POSITIONS, 1])}, "positions: expected indices within"),
        ("linear_norm_experts", {"residual": torch.zeros(2, HIDDEN)}, "residual: expected shape"),
        ("linear_norm_experts", {"top_k": EXPERTS + 1}, "top_k: expected"),
    ],
)
def test_bad_arguments_are_named(name: str, change: dict[str, Any], message: str) -> None:
    call, inputs = CALLS[name]
    with pytest.raises((ValueError, IndexError), match=message):
        call(**(inputs(3, torch.float32) | change))
