"""The output gate, one for an element or one for a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.triton_elementwise import outer_and_inner, sigmoid
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_overlap import overlapping_here, wait_for_launch_in_front
from qnext_kernels.triton_support import ELEMENTS, ceil_div, inner_rows, power_of_two, vector_of, vector_rows


@triton.jit(do_not_specialize=["x_outer", "x_inner", "gate_outer", "gate_inner", "inner", "rows"])
def sigmoid_gate_kernel(  # type: ignore[no-untyped-def]
    x, gate, out, x_outer, x_inner, gate_outer, gate_inner, inner, rows,
    WIDTH: tl.constexpr, VECTOR: tl.constexpr, GATE_WIDTH: tl.constexpr, GATE_VECTOR: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """x · sigmoid(gate) for ROWS rows and BLOCK of their columns.

    Grid: ceil(rows / ROWS) × ceil(WIDTH / BLOCK). Bytes: x and gate read once, out written once.

    Args:
        x: rows of WIDTH; gate: rows of GATE_WIDTH, which is WIDTH or 1. Their strides count vectors.
        out: contiguous [rows, WIDTH].
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < WIDTH)
    outer, within = outer_and_inner(row, inner, rows)
    x_at = (outer * x_outer + within * x_inner)[:, None] * VECTOR + column[None, :]
    gate_at = (outer * gate_outer + within * gate_inner)[:, None] * GATE_VECTOR
    wait_for_launch_in_front(OVERLAPS)
    if GATE_WIDTH == 1:
        g = tl.load(gate + gate_at, mask=row[:, None] < rows, other=0.0).to(tl.float32)
    else:
        g = tl.load(gate + gate_at + column[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(x + x_at, mask=inside, other=0.0).to(tl.float32) * sigmoid(g)
    tl.store(out + row.to(tl.int64)[:, None] * WIDTH + column[None, :], y.to(out.dtype.element_ty), mask=inside)


def run_sigmoid_gate(x: Tensor, gate: Tensor, out: Tensor) -> None:
    """Launch :func:`sigmoid_gate_kernel`; out, contiguous and of the shape of x, is written."""
    width, gate_width = x.shape[-1], gate.shape[-1]
    if out.numel() == 0:
        return
    vector, gate_vector, rows = vector_of(width, x.dtype), vector_of(gate_width, gate.dtype), out.numel() // width
    x, *x_strides = vector_rows(x, vector)
    gate, *gate_strides = vector_rows(gate, gate_vector)
    block = min(ELEMENTS, power_of_two(width))
    launch(
        sigmoid_gate_kernel, (ceil_div(rows, ELEMENTS // block), ceil_div(width, block)),
        x, gate, out, *x_strides, *gate_strides, inner_rows(x), rows,
        WIDTH=width, VECTOR=vector, GATE_WIDTH=gate_width, GATE_VECTOR=gate_vector,
        ROWS=ELEMENTS // block, BLOCK=block, num_warps=4, num_stages=1, enable_fp_fusion=False,
        **overlapping_here(),
    )  # fmt: skip
