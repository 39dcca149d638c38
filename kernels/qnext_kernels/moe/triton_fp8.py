"""Experts of block-wise FP8 weights: activations quantized by groups, products in e4m3, scales on their partial sums.

Where the GPU does not multiply e4m3 (NVIDIA below compute capability 8.9, AMD's gfx942, whose e4m3 is another), weights
are read as the same bytes and decoded in registers, and activations lie in bfloat16, rounded to values of e4m3. Both
are exact, so the products are those of e4m3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.fp8 import FP8_GROUP
from qnext_kernels.moe.configurations import Configuration, Few
from qnext_kernels.moe.triton_experts import Call, Shared, Weights, quantized_rows
from qnext_kernels.moe.triton_few import run_few
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_overlap import APART, wait_for_launch_in_front
from qnext_kernels.triton_support import Target, ceil_div, power_of_two

GROUPS_AT_ONCE = 16


@triton.jit(do_not_specialize=["groups"])
def quantize_kernel(  # type: ignore[no-untyped-def]
    x, quantized, scales, x_row, groups, SIZE: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    AT_ONCE: tl.constexpr, DECODE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Divide each group of GROUP columns by its largest magnitude over 448 and round to e4m3.

    Grid: ceil(groups / AT_ONCE). Bytes: x once, half of that written.

    Args:
        x: [rows, SIZE], rows ``x_row`` elements apart.
        quantized: contiguous [rows, SIZE], written: e4m3, or bfloat16 where DECODE.
        scales: contiguous [rows, GROUPS] float32, written.
        groups: rows · GROUPS.
    """
    group = (tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)).to(tl.int64)
    row = group // GROUPS
    wait_for_launch_in_front(OVERLAPS)
    columns = (group % GROUPS * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    inside = (group < groups)[:, None] & (columns < SIZE)
    values, scale = quantized_rows(tl.load(x + row[:, None] * x_row + columns, mask=inside, other=0.0), DECODE)
    tl.store(quantized + row[:, None] * SIZE + columns, values, mask=inside)
    tl.store(scales + group, scale, mask=group < groups)


def quantize(x: Tensor, decode: bool, overlap: Mapping[str, bool] = APART) -> tuple[Tensor, Tensor]:
    """Launch :func:`quantize_kernel` over [rows, SIZE]; returns what it writes."""
    rows, size = x.shape
    count = ceil_div(size, FP8_GROUP)
    dtype = torch.bfloat16 if decode else torch.float8_e4m3fn
    quantized = torch.empty(rows, size, dtype=dtype, device=x.device)
    scales = torch.empty(rows, count, dtype=torch.float32, device=x.device)
    at_once = min(GROUPS_AT_ONCE, power_of_two(rows * count))
    launch(
        quantize_kernel, (ceil_div(rows * count, at_once),),
        x, quantized, scales, x.stride(0), rows * count, SIZE=size, GROUPS=count, GROUP=FP8_GROUP, AT_ONCE=at_once,
        DECODE=decode, num_warps=4, num_stages=1, enable_fp_fusion=True, **overlap,
    )  # fmt: skip
    return quantized, scales


def run_fp8(
    x: Tensor,
    routed: Weights,
    shared: Shared | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    config: Configuration | Few,
    target: Target,
) -> Tensor:
    """The experts over weights in float8_e4m3fn; arguments as those of :class:`Call`."""
    decode = not target.e4m3
    if decode:
        routed = _as_bytes(routed)
        shared = None if shared is None else shared._replace(weights=_as_bytes(shared.weights))
    if isinstance(config, Few):
        return run_few(x, routed, shared, topk_weights, topk_ids, config, target, decode=decode)
    call = Call(x, routed, shared, topk_weights, topk_ids, config, target, decode=decode)
    middle = call.up(*quantize(x, decode, call.overlap))
    return call.sum(call.down(*quantize(middle, decode, call.overlap)))


def _as_bytes(weights: Weights) -> Weights:
    return weights._replace(w13=weights.w13.view(torch.uint8), w2=weights.w2.view(torch.uint8))
