"""The zero-centred RMSNorm with its residual: a row is read once and stays in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.triton_elementwise import inverse_rms, outer_and_inner
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_overlap import overlapping_here, wait_for_launch_in_front
from qnext_kernels.triton_support import aligned_rows, ceil_div, inner_rows, row_tile, vector_of, vector_rows


@triton.jit(do_not_specialize=["x_outer", "x_inner", "residual_outer", "residual_inner", "inner", "rows"])
def rms_norm_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, out, total, x_outer, x_inner, residual_outer, residual_inner, inner, rows, eps,
    WITH_RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """r = x + residual, rounded, and r / √(mean(r²) + eps) · (1 + weight), for ROWS rows.

    Grid: ceil(rows / ROWS). Bytes: x, and with a residual that too, read once; out and r written once.

    Args:
        x, residual: rows of WIDTH; their strides count vectors of VECTOR elements.
        weight: contiguous [WIDTH]; out, total: contiguous [rows, WIDTH]; total is not written without a residual.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < WIDTH)
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    outer, within = outer_and_inner(row, inner, rows)
    x_at = (outer * x_outer + within * x_inner)[:, None] * VECTOR + column[None, :]
    wait_for_launch_in_front(OVERLAPS)
    r = tl.load(x + x_at, mask=inside, other=0.0).to(tl.float32)
    if WITH_RESIDUAL:
        residual_at = (outer * residual_outer + within * residual_inner)[:, None] * VECTOR + column[None, :]
        rounded = (r + tl.load(residual + residual_at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        r = rounded.to(tl.float32)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    normed = r * inverse_rms(r, eps, WIDTH) * (1.0 + w)[None, :]
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)


def run_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, total: Tensor) -> None:
    """Launch :func:`rms_norm_kernel`; out, and with a residual total, contiguous and of the shape of x, are written."""
    width = weight.shape[0]
    if out.numel() == 0:
        return
    vector, rows, config = vector_of(width, x.dtype), out.numel() // width, row_tile(width)
    x, *x_strides = vector_rows(x, vector)
    added, *added_strides = (x, 0, 0) if residual is None else vector_rows(residual, vector)
    launch(
        rms_norm_kernel, (ceil_div(rows, config["ROWS"]),),
        x, added, aligned_rows(weight), out, total, *x_strides, *added_strides, inner_rows(x), rows, eps,
        WITH_RESIDUAL=residual is not None, WIDTH=width, VECTOR=vector, enable_fp_fusion=False, **config,
        **overlapping_here(),
    )  # fmt: skip
