"""Random arguments of the experts, with weights in any dtype, in FP8 and int4 too, and with a shared expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext_kernels import topk_softmax
from qnext_kernels.fp8 import FP8, FP8_GROUP
from qnext_kernels.integers import GROUPED, INT4
from tests.kernels.integer_inputs import random_weight

EXPERTS, TOP_K, HIDDEN, MIDDLE, SHARED_MIDDLE = 9, 3, 40, 24, 20
# One that is not a multiple of a group, in either direction, and two groups of a sum.
FP8_HIDDEN, FP8_MIDDLE, FP8_SHARED_MIDDLE = 200, 136, 72
# By groups: panels that are whole and not, of the routed experts and of the shared one.
INT4_SIZES = {32: (160, 96, 64), 64: (320, 192, 64), 128: (256, 128, 384)}


def random_choice(tokens: int, num_experts: int = EXPERTS, top_k: int = TOP_K) -> tuple[Tensor, Tensor]:
    """Weights and ids of a random router, with one in five of another rank."""
    weights, ids = topk_softmax(torch.randn(tokens, num_experts), top_k, renormalize=True)
    ids[torch.rand(tokens, top_k) < 0.2] = -1
    return weights, ids


def random_experts(tokens: int, dtype: torch.dtype, *, shared: bool = False, hidden: int = HIDDEN) -> dict[str, Any]:
    """Arguments of :func:`qnext_kernels.experts`."""

    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype)

    weights, ids = random_choice(tokens)
    arguments: dict[str, Any] = {
        "x": torch.randn(tokens, hidden).to(dtype),
        "w13": weight(EXPERTS, 2 * MIDDLE, hidden),
        "w2": weight(EXPERTS, hidden, MIDDLE),
        "topk_weights": weights,
        "topk_ids": ids,
    }
    if shared:
        gate = weight(hidden)
        arguments["shared"] = weight(2 * SHARED_MIDDLE, hidden), weight(hidden, SHARED_MIDDLE), gate
    return arguments


def random_fp8(tokens: int, dtype: torch.dtype, *, shared: bool = False) -> dict[str, Any]:
    """Arguments of :func:`qnext_kernels.experts_fp8`."""
    num_experts = 4

    def weight(*shape: int) -> tuple[Tensor, Tensor]:
        values = (torch.randn(shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        blocks = [-(-size // FP8_GROUP) for size in shape[-2:]]
        return values, torch.rand(*shape[:-2], *blocks) * 0.02 * shape[-1] ** -0.5

    def gate_and_up(*shape: int) -> tuple[Tensor, Tensor]:
        values, scales = weight(*shape[:-2], 2, *shape[-2:])
        return values.flatten(-3, -2), scales.flatten(-3, -2)

    w13, w13_scale = gate_and_up(num_experts, FP8_MIDDLE, FP8_HIDDEN)
    w2, w2_scale = weight(num_experts, FP8_HIDDEN, FP8_MIDDLE)
    weights, ids = random_choice(tokens, num_experts, 2)
    arguments: dict[str, Any] = {
        "x": torch.randn(tokens, FP8_HIDDEN).to(dtype),
        "w13": w13,
        "w13_scale": w13_scale,
        "w2": w2,
        "w2_scale": w2_scale,
        "topk_weights": weights,
        "topk_ids": ids,
    }
    if shared:
        gate = (torch.randn(FP8_HIDDEN) * FP8_HIDDEN**-0.5).to(dtype)
        up, down = gate_and_up(FP8_SHARED_MIDDLE, FP8_HIDDEN), weight(FP8_HIDDEN, FP8_SHARED_MIDDLE)
        arguments["shared"] = *up, *down, gate
    return arguments


def random_int4(
    tokens: int, dtype: torch.dtype, *, group: int = 32, shared: torch.dtype | None = None
) -> dict[str, Any]:
    """Arguments of :func:`qnext_kernels.experts_int4`; ``shared`` is how a shared expert is stored."""
    num_experts, (hidden, middle, shared_middle) = 4, INT4_SIZES[group]

    def weight(*shape: int, stored: torch.dtype = INT4) -> tuple[Tensor, ...]:
        if stored not in GROUPED:
            return ((torch.randn(shape) * shape[-1] ** -0.5).to(stored),)
        return random_weight(*shape, stored=stored, group=group, dtype=dtype)

    w13, w13_scale = weight(num_experts, 2 * middle, hidden)
    w2, w2_scale = weight(num_experts, hidden, middle)
    weights, ids = random_choice(tokens, num_experts, 2)
    arguments: dict[str, Any] = {
        "x": torch.randn(tokens, hidden).to(dtype),
        "w13": w13,
        "w13_scale": w13_scale,
        "w2": w2,
        "w2_scale": w2_scale,
        "topk_weights": weights,
        "topk_ids": ids,
    }
    if shared is not None:
        up, down = weight(2 * shared_middle, hidden, stored=shared), weight(hidden, shared_middle, stored=shared)
        arguments["shared"] = *up, *down, (torch.randn(hidden) * hidden**-0.5).to(dtype)
    return arguments


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with all in float64 that is no quantized weight, scale of FP8, index or routing weight."""

    def exact(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(exact(part) for part in value)
        return value.double() if value.dtype in (torch.float32, torch.bfloat16, torch.float16) else value

    fp8 = arguments["w13"].dtype == FP8
    kept = {"topk_weights", "w13_scale", "w2_scale"} if fp8 else {"topk_weights"}
    converted = {name: value if name in kept else exact(value) for name, value in arguments.items()}
    if fp8 and "shared" in arguments:
        up, up_scale, down, down_scale, gate = arguments["shared"]
        converted["shared"] = up, up_scale, down, down_scale, gate.double()
    return converted


def rows_of(arguments: dict[str, Any], some: slice) -> dict[str, Any]:
    """The arguments of some of the tokens."""
    return arguments | {name: arguments[name][some] for name in ("x", "topk_weights", "topk_ids")}


def fp8_roundings(arguments: dict[str, Any]) -> dict[torch.dtype, float]:
    """How often what enters one element of the result of :func:`random_fp8` has been rounded.

    Both sides quantize alike, but what comes out of SwiGLU may differ by one rounding to the dtype of x, and one such
    difference in 2 · (spacing of e4m3) / (spacing of that dtype) makes it a neighbouring e4m3 number.
    """
    dtype = arguments["x"].dtype
    counts: dict[torch.dtype, float] = {torch.float32: FP8_HIDDEN + FP8_MIDDLE}
    if dtype != torch.float32:
        counts[dtype] = 2
        counts[torch.float8_e4m3fn] = torch.finfo(dtype).eps / torch.finfo(torch.float8_e4m3fn).eps
    return counts
