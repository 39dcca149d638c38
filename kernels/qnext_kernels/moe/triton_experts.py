"""The routed experts and the shared one: two grouped matrix products and a sum, in a launch each.

A program of a product takes a block of pairs (token, choice) of one expert, from :mod:`.triton_align`, and some of its
columns. The shared expert is one more expert, of separate tensors, that every token chooses: its blocks are the first.
Sums over the hidden and the middle size run in float32 and in one order; the sum over a token's experts runs in the
order of its choices. Weights in FP8 (:mod:`.triton_fp8`) run through the same kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.dispatch import is_deterministic
from qnext_kernels.fp8 import FP8_GROUP, FP8_MAX, FP8_TINY
from qnext_kernels.moe.configurations import Configuration, Product
from qnext_kernels.moe.triton_align import align, most_blocks
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_overlap import overlapping, wait_for_launch_in_front
from qnext_kernels.triton_support import ALIGNMENT, Target, ceil_div, power_of_two

OVERLAPPED_TOKENS = 64
"""Up to so many, launches overlap: then they are short. In the deterministic mode no kernel depends on the number."""
LARGEST, TINY = tl.constexpr(FP8_MAX), tl.constexpr(FP8_TINY)


@triton.jit
def find_block(  # type: ignore[no-untyped-def]
    block, table, most_blocks, tokens, shared_blocks, E: tl.constexpr, ROWS: tl.constexpr
):
    """The expert of a block (E: the shared one, −1: none), its first place and the place behind its last.

    A place is one of the sorted order, of the shared expert a token.
    """
    routed = block - shared_blocks
    is_routed = routed >= 0
    expert = tl.load(table + routed, mask=is_routed, other=-1)
    first = tl.load(table + most_blocks + routed, mask=is_routed, other=0)
    end = tl.load(table + 2 * most_blocks + routed, mask=is_routed, other=0)
    first = tl.where(is_routed, first, block * ROWS)
    end = tl.where(is_routed, end, tl.minimum(first + ROWS, tokens))
    return tl.where(is_routed, expert, E), first, end


@triton.jit
def of_expert(  # type: ignore[no-untyped-def]
    routed, stride, shared, expert, E: tl.constexpr, SHARED: tl.constexpr, ALIGNED: tl.constexpr
):
    """Where the weights of an expert begin, or their scales; ALIGNED: always at a multiple of 16 bytes."""
    place = routed + expert.to(tl.int64) * stride
    if SHARED > 0:
        # A choice between addresses, since Triton 3.6 fails for AMD over one between pointers.
        address = tl.where(expert == E, shared.to(tl.int64), place.to(tl.int64))
        place = address.to(routed.dtype)
        if ALIGNED:
            place = tl.multiple_of(place, 16)
    return place


@triton.jit
def e4m3_value(bits):  # type: ignore[no-untyped-def]
    """The bfloat16 numbers that uint8 stores as e4m3; the bits of NaN give ±480."""
    magnitude = (bits & 0x7F).to(tl.int32)
    # The exponent's bias is 7 there and 127 here; below the smallest exponent the mantissa counts by 2⁻⁹.
    normal = ((magnitude + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    return tl.where(bits >= 128, -value, value).to(tl.bfloat16)


@triton.jit
def rounded_to_e4m3(x):  # type: ignore[no-untyped-def]
    """Float32 within ±448 rounded to the nearest value of e4m3, ties to even, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # Below 2⁻⁶ values are 2⁻⁹ apart, as float32 is where it is added to 1.5 · 2¹⁴.
    small = (x + 24576.0) - 24576.0
    return tl.where(tl.abs(x) < 0.015625, small, normal)


@triton.jit
def quantized_rows(values, DECODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each row as a group of activations: e4m3, or bfloat16 where DECODE, and scales.

    As :func:`qnext_kernels.moe.reference.quantize_groups`, whose division is exactly rounded too.
    """
    values = values.to(tl.float32)
    scales = tl.div_rn(tl.maximum(tl.max(tl.abs(values), axis=1), TINY), LARGEST)
    # A quotient from the rounded reciprocal, and what that leaves over: exactly rounded too, at a third of the cost.
    inverse = tl.broadcast_to(tl.div_rn(1.0, scales)[:, None], values.shape)
    nearly = values * inverse
    rest = tl.fma(-nearly, tl.broadcast_to(scales[:, None], values.shape), values)
    values = tl.fma(rest, inverse, nearly)
    values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
    values = rounded_to_e4m3(values).to(tl.bfloat16) if DECODE else values.to(tl.float8e4nv)
    return values, scales


@triton.jit
def is_up(COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which of COLUMNS columns of the first product are those of up: eight after eight of the gate."""
    return tl.arange(0, COLUMNS) // 8 % 2 == 1


@triton.jit
def weighted_sum(  # type: ignore[no-untyped-def]
    a, a_rows, a_inside, a_scales, b, b_rows, b_inside, b_scale, up_scale, SIZE: tl.constexpr, size,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PAIRED: tl.constexpr, GROUP: tl.constexpr,
    DECODE: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a bᵀ in float32, [ROWS, COLUMNS]: DEPTH elements of the sum after DEPTH elements, from the first.

    Args:
        a, b: where rows 0 begin; a_rows [ROWS], b_rows [COLUMNS]: where each row begins behind that, int64.
        a_inside, b_inside: which rows there are; others are zeros.
        a_scales [ROWS]: pointers to the scales of the first GROUP elements of each row, the next ones behind them.
        b_scale: pointer to those of all rows of b, or where PAIRED of those of the gate; up_scale: of those of up.
            No scale is read where GROUP is 0.
        SWAPPED: the instruction computes b aᵀ. It takes 64 rows of b then, and of a no more than there are.
        SIZE: elements of the sum, 0 where they are ``size``, known only to the program.
    """
    # The axis of rows in the product that is computed, and of elements in its right factor.
    ROW: tl.constexpr = 1 if SWAPPED else 0
    index = tl.arange(0, DEPTH)
    a_pointers = a + tl.expand_dims(a_rows, 1 - ROW) + tl.expand_dims(index, ROW)
    b_pointers = b + tl.expand_dims(b_rows, ROW) + tl.expand_dims(index, 1 - ROW)
    # All columns of a program, and all elements loaded at once, have one scale.
    tl.static_assert(GROUP == 0 or GROUP % DEPTH == 0)
    tl.static_assert(GROUP == 0 or GROUP % (COLUMNS // 2 if PAIRED else COLUMNS) == 0)
    total = tl.zeros([COLUMNS, ROWS] if SWAPPED else [ROWS, COLUMNS], tl.float32)
    if GROUP > 0:
        next_a, next_b, next_up = tl.load(a_scales, mask=a_inside, other=0.0), tl.load(b_scale), tl.load(up_scale)
    for k in range(0, SIZE if SIZE > 0 else size, DEPTH):
        a_mask, b_mask = tl.expand_dims(a_inside, 1 - ROW), tl.expand_dims(b_inside, ROW)
        if SIZE == 0 or SIZE % DEPTH != 0:
            a_mask = a_mask & (k + tl.expand_dims(index, ROW) < (SIZE if SIZE > 0 else size))
            b_mask = b_mask & (k + tl.expand_dims(index, 1 - ROW) < (SIZE if SIZE > 0 else size))
        left = tl.load(a_pointers + k, mask=a_mask, other=0.0)
        if DECODE:
            right = e4m3_value(tl.load(b_pointers + k, mask=b_mask, other=0))
        else:
            right = tl.load(b_pointers + k, mask=b_mask, other=0.0)
        if SWAPPED:
            left, right = right, left
        if GROUP > 0:
            scales, scale, up = next_a, next_b, next_up
            # Those of the next step are on their way during this one: Triton only does that for what is multiplied.
            behind, more = (k + DEPTH) // GROUP, k + DEPTH < (SIZE if SIZE > 0 else size)
            next_a = tl.load(a_scales + behind, mask=a_inside & more, other=0.0)
            next_b = tl.load(b_scale + behind, mask=more, other=0.0)
            part = tl.dot(left, right, out_dtype=tl.float32)
            if PAIRED:
                next_up = tl.load(up_scale + behind, mask=more, other=0.0)
                scale = tl.expand_dims(tl.where(is_up(COLUMNS), up, scale), ROW)
            total += part * (tl.expand_dims(scales, 1 - ROW) * scale)
        else:
            total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=tl.float32)
    return tl.trans(total) if SWAPPED else total


@triton.jit
def silu_times(gate, up):  # type: ignore[no-untyped-def]
    """SiLU(gate) · up."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def shared_strength(x, gate, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """sigmoid(x · gate), what the shared expert of a token x [D] counts; ``gate``: contiguous [D]."""
    index = tl.arange(0, BLOCK_D)
    hidden = tl.load(x + index, mask=index < D, other=0.0).to(tl.float32)
    row = tl.load(gate + index, mask=index < D, other=0.0).to(tl.float32)
    return 1.0 / (1.0 + tl.exp(-tl.sum(hidden * row, axis=0)))


@triton.jit(do_not_specialize=["most_blocks", "tokens", "shared_blocks"])
def up_kernel(  # type: ignore[no-untyped-def]
    x, x_scale, w13, w13_scale, shared_w13, shared_w13_scale, order, table, middle,
    x_token, w13_expert, scale_expert, most_blocks, tokens, shared_blocks,
    D: tl.constexpr, MIDDLE: tl.constexpr, SHARED_MIDDLE: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    DECODE: tl.constexpr, ALIGNED: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """middle = SiLU(gate x) · up x for a block of pairs and COLUMNS of the middle size, rounded once.

    Eight columns of the product are those of the gate and the next eight those of up, so that a thread has both.

    Grid: (shared_blocks + blocks) · ceil(max(MIDDLE, SHARED_MIDDLE) / COLUMNS), the columns of a block next to each
    other, which share its rows. A program without a block ends at once.

    Bytes of a block: 2 MIDDLE · D weights, once from memory for all blocks of an expert, and ROWS · D activations.
    Operations: 4 ROWS · MIDDLE · D.

    Args:
        x: [T, D], rows ``x_token`` elements apart. w13: [E, 2·MIDDLE, D], an expert ``w13_expert`` elements from the
            next, contiguous otherwise. shared_w13: contiguous [2·SHARED_MIDDLE, D], not read where that is 0.
        x_scale: contiguous [T, ceil(D / GROUP)]; w13_scale: [E, 2·ceil(MIDDLE / GROUP), ceil(D / GROUP)], an expert
            ``scale_expert`` elements from the next; shared_w13_scale: as that of an expert. Not read where GROUP is 0.
        order, table: of :class:`qnext_kernels.moe.triton_align.Blocks`.
        middle: [T·top_k + T, max(MIDDLE, SHARED_MIDDLE)], written: the rows of pairs by place, then those of the
            shared expert by token; zeros behind the narrower of both.
        DECODE: w13 is uint8 with the bits of e4m3.
        ALIGNED: every expert of w13 begins at a multiple of 16 bytes.
    """
    WIDTH: tl.constexpr = max(MIDDLE, SHARED_MIDDLE)
    TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    tile = program % TILES
    wait_for_launch_in_front(OVERLAPS)
    expert, first, end = find_block(program // TILES, table, most_blocks, tokens, shared_blocks, E, ROWS)
    if expert < 0:
        return
    is_shared = expert == E
    size = tl.where(is_shared, SHARED_MIDDLE, MIDDLE) if SHARED_MIDDLE > 0 else MIDDLE
    w = of_expert(w13, w13_expert, shared_w13, expert, E, SHARED_MIDDLE, ALIGNED)
    scale = of_expert(w13_scale, scale_expert, shared_w13_scale, expert, E, SHARED_MIDDLE, False)

    places = first + tl.arange(0, ROWS)
    inside = places < end
    pair = tl.load(order + places, mask=inside & (expert < E), other=0)
    token = tl.where(is_shared, places, pair // TOP_K)
    columns = tile * COLUMNS + tl.arange(0, 2 * COLUMNS) // 16 * 8 + tl.arange(0, 2 * COLUMNS) % 8
    in_w13 = tl.where(is_up(2 * COLUMNS), size + columns, columns)
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP if GROUP > 0 else 0
    if GROUP > 0:
        # Columns behind the last, of the narrower kind of expert, have no scale.
        scale += tl.minimum(tile * COLUMNS, size - 1) // GROUP * GROUPS
        up_scale = scale + (size + GROUP - 1) // GROUP * GROUPS
    else:
        up_scale = scale
    both = weighted_sum(
        x, token.to(tl.int64) * x_token, inside, x_scale + token.to(tl.int64) * GROUPS,
        w, in_w13.to(tl.int64) * D, columns < size, scale, up_scale,
        D, D, DEPTH, ROWS, 2 * COLUMNS, True, GROUP, DECODE, SWAPPED, PRECISION,
    )  # fmt: skip
    gate, up = tl.split(tl.permute(tl.reshape(both, [ROWS, COLUMNS // 8, 2, 8]), (0, 1, 3, 2)))
    activated = tl.reshape(silu_times(gate, up), [ROWS, COLUMNS])
    row = places.to(tl.int64) + tl.where(is_shared, tokens.to(tl.int64) * TOP_K, 0)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    place = middle + row[:, None] * WIDTH + column[None, :]
    tl.store(place, activated.to(middle.dtype.element_ty), mask=inside[:, None] & (column[None, :] < WIDTH))


@triton.jit(do_not_specialize=["most_blocks", "tokens", "shared_blocks"])
def down_kernel(  # type: ignore[no-untyped-def]
    middle, middle_scale, w2, w2_scale, shared_w2, shared_w2_scale, order, table, results,
    w2_expert, scale_expert, most_blocks, tokens, shared_blocks,
    D: tl.constexpr, MIDDLE: tl.constexpr, SHARED_MIDDLE: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    DECODE: tl.constexpr, ALIGNED: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """results = down · middle for a block of pairs and COLUMNS of the hidden size, rounded.

    Grid: (shared_blocks + blocks) · ceil(D / COLUMNS), otherwise as :func:`up_kernel`.

    Bytes of a block: MIDDLE · D weights, once from memory for all blocks of an expert, ROWS · MIDDLE of ``middle`` and
    ROWS · D written. Operations: 2 ROWS · MIDDLE · D.

    Args:
        middle: of :func:`up_kernel`, or that quantized, with middle_scale, contiguous, one for GROUP columns of a row.
        w2: [E, D, MIDDLE], an expert ``w2_expert`` elements from the next; shared_w2: contiguous [D, SHARED_MIDDLE].
        w2_scale: [E, ceil(D / GROUP), ceil(MIDDLE / GROUP)], an expert ``scale_expert`` elements from the next.
        results: [T·top_k + T, D], written: of every pair that has an expert, by pair, then of the shared expert.
    """
    WIDTH: tl.constexpr = max(MIDDLE, SHARED_MIDDLE)
    TILES: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    tile = program % TILES
    wait_for_launch_in_front(OVERLAPS)
    expert, first, end = find_block(program // TILES, table, most_blocks, tokens, shared_blocks, E, ROWS)
    if expert < 0:
        return
    is_shared = expert == E
    size = tl.where(is_shared, SHARED_MIDDLE, MIDDLE) if SHARED_MIDDLE > 0 else MIDDLE
    w = of_expert(w2, w2_expert, shared_w2, expert, E, SHARED_MIDDLE, ALIGNED)
    scale = of_expert(w2_scale, scale_expert, shared_w2_scale, expert, E, SHARED_MIDDLE, False)

    places = first + tl.arange(0, ROWS)
    inside = places < end
    pair = tl.load(order + places, mask=inside & (expert < E), other=0)
    behind = tokens.to(tl.int64) * TOP_K
    row = tl.where(is_shared, places + behind, places)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    GROUPS: tl.constexpr = (WIDTH + GROUP - 1) // GROUP if GROUP > 0 else 0
    if GROUP > 0:
        scale += tile * COLUMNS // GROUP * ((size + GROUP - 1) // GROUP)
    SIZE: tl.constexpr = MIDDLE if SHARED_MIDDLE == 0 or SHARED_MIDDLE == MIDDLE else 0
    product = weighted_sum(
        middle, row * WIDTH, inside, middle_scale + row * GROUPS,
        w, columns.to(tl.int64) * size, columns < D, scale, scale,
        SIZE, size, DEPTH, ROWS, COLUMNS, False, GROUP, DECODE, SWAPPED, PRECISION,
    )  # fmt: skip
    target = tl.where(is_shared, places + behind, pair)
    place = results + target[:, None] * D + columns[None, :]
    tl.store(place, product.to(results.dtype.element_ty), mask=inside[:, None] & (columns[None, :] < D))


@triton.jit(do_not_specialize=["tokens"])
def sum_kernel(  # type: ignore[no-untyped-def]
    results, weights, ids, x, gate, out, x_token, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """out = Σ_j weights_j · results_j in the order of a token's choices, then sigmoid(x · gate) · the shared expert's.

    Grid: T. Bytes: (TOP_K + 1) D read and D written; with a shared expert D more for x.

    Args:
        results: of :func:`down_kernel`; weights, ids: contiguous [T, TOP_K]; x: [T, D], rows ``x_token`` elements
            apart; gate: contiguous [D]; out: contiguous [T, D], written.
    """
    token = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK_D)
    inside = index < D
    wait_for_launch_in_front(OVERLAPS)
    total = tl.zeros([BLOCK_D], tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        expert = tl.load(ids + pair)
        chosen = (expert >= 0) & (expert < E)
        result = tl.load(results + pair * D + index, mask=inside & chosen, other=0.0).to(tl.float32)
        total += tl.load(weights + pair, mask=chosen, other=0.0) * result
    if SHARED:
        strength = shared_strength(x + token * x_token, gate, D, BLOCK_D)
        result = tl.load(results + (tokens.to(tl.int64) * TOP_K + token) * D + index, mask=inside, other=0.0)
        total += strength * result.to(tl.float32)
    tl.store(out + token * D + index, total.to(out.dtype.element_ty), mask=inside)


class Weights(NamedTuple):
    """Both projections of all experts of a kind, and their scales where they are in FP8."""

    w13: Tensor
    w2: Tensor
    w13_scale: Tensor | None = None
    w2_scale: Tensor | None = None


class Shared(NamedTuple):
    """The shared expert, its projections as one expert's, and its gate [D]."""

    weights: Weights
    gate: Tensor


class Call:
    """The three launches over tensors whose last dimensions have unit stride, and what they have in common."""

    def __init__(
        self,
        x: Tensor,
        routed: Weights,
        shared: Shared | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: Configuration,
        target: Target,
        *,
        decode: bool = False,
    ) -> None:
        """Sort the choices into blocks.

        Args:
            x: [T, D] of any float dtype of Triton, the dtype of the result.
            routed, shared: as :func:`up_kernel` and :func:`down_kernel` take them.
            topk_weights, topk_ids: contiguous [T, top_k].
            config: of this call.
            decode: the weights are uint8 with the bits of e4m3, and the products run in bfloat16.
        """
        tokens, top_k = topk_ids.shape
        num_experts, hidden, middle = routed.w2.shape
        self.x, self.routed, self.shared = x, routed, shared
        self.topk_weights, self.topk_ids, self.config = topk_weights, topk_ids, config
        self.shared_middle = 0 if shared is None else shared.weights.w2.shape[1]
        self.width = max(middle, self.shared_middle)
        self.overlap = overlapping(target, tokens <= OVERLAPPED_TOKENS and not is_deterministic())
        self.rows = tokens * top_k + (0 if shared is None else tokens)
        self.shared_blocks = 0 if shared is None else ceil_div(tokens, config.rows)
        self.order, self.table, _ = align(topk_ids, num_experts, config.rows, self.overlap)
        self.routed_blocks = most_blocks(topk_ids.numel(), num_experts, config.rows)
        self.blocks = self.shared_blocks + self.routed_blocks
        self.common: dict[str, Any] = {
            "D": hidden,
            "MIDDLE": middle,
            "SHARED_MIDDLE": self.shared_middle,
            "E": num_experts,
            "TOP_K": top_k,
            "ROWS": config.rows,
            "GROUP": 0 if routed.w13_scale is None else FP8_GROUP,
            "DECODE": decode,
            "PRECISION": target.precision(x.dtype),
            "enable_fp_fusion": True,
            **self.overlap,
        }

    def up(self, x: Tensor, x_scale: Tensor | None = None) -> Tensor:
        """Launch :func:`up_kernel`; the result is in the dtype of the result of the call."""
        middle = torch.empty(self.rows, self.width, dtype=self.x.dtype, device=self.x.device)
        w13, scale = self.routed.w13, or_other(self.routed.w13_scale, x)
        shared = self.routed if self.shared is None else self.shared.weights
        product = self.config.up
        launch(
            up_kernel, (self.blocks * ceil_div(self.width, product.columns),),
            x, or_other(x_scale, x), w13, scale, shared.w13, or_other(shared.w13_scale, x),
            self.order, self.table, middle,
            x.stride(0), w13.stride(0), scale.stride(0), self.routed_blocks, self.x.shape[0], self.shared_blocks,
            ALIGNED=aligned(w13), **self.common, **_launch(product),
        )  # fmt: skip
        return middle

    def down(self, middle: Tensor, middle_scale: Tensor | None = None) -> Tensor:
        """Launch :func:`down_kernel`; the result is in the dtype of the result of the call."""
        results = torch.empty(self.rows, self.x.shape[1], dtype=self.x.dtype, device=self.x.device)
        w2, scale = self.routed.w2, or_other(self.routed.w2_scale, middle)
        shared = self.routed if self.shared is None else self.shared.weights
        product = self.config.down
        launch(
            down_kernel, (self.blocks * ceil_div(self.x.shape[1], product.columns),),
            middle, or_other(middle_scale, middle), w2, scale, shared.w2, or_other(shared.w2_scale, middle),
            self.order, self.table, results,
            w2.stride(0), scale.stride(0), self.routed_blocks, self.x.shape[0], self.shared_blocks,
            ALIGNED=aligned(w2), **self.common, **_launch(product),
        )  # fmt: skip
        return results

    def sum(self, results: Tensor) -> Tensor:
        """Launch :func:`sum_kernel`."""
        tokens, hidden = self.x.shape
        out = torch.empty(tokens, hidden, dtype=self.x.dtype, device=self.x.device)
        block = power_of_two(hidden)
        launch(
            sum_kernel, (tokens,),
            results, self.topk_weights, self.topk_ids, self.x, self.x if self.shared is None else self.shared.gate,
            out, self.x.stride(0), tokens,
            D=hidden, BLOCK_D=block, E=self.common["E"], TOP_K=self.common["TOP_K"], SHARED=self.shared is not None,
            num_warps=max(1, min(8, block // 256)), num_stages=1, enable_fp_fusion=True, **self.overlap,
        )  # fmt: skip
        return out


def or_other(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A tensor, or another in the place of one that the kernel does not read."""
    return other if tensor is None else tensor


def aligned(weight: Tensor) -> bool:
    """Whether every expert of aligned weights is aligned."""
    return weight.stride(0) * weight.itemsize % ALIGNMENT == 0


def _launch(product: Product) -> dict[str, int]:
    return {
        "COLUMNS": product.columns,
        "DEPTH": product.depth,
        "num_warps": product.warps,
        "num_stages": product.stages,
        "SWAPPED": product.swapped,
    }


def matrices(weight: Tensor) -> Tensor:
    """Weights [..., N, K] whose matrices are contiguous and begin at aligned addresses, copied where they are not."""
    fits = weight.stride()[-2:] == (weight.shape[-1], 1) and weight.data_ptr() % ALIGNMENT == 0
    return weight if fits else weight.clone(memory_format=torch.contiguous_format)
