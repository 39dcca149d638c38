"""The gated RMSNorm over heads of one value dim: many short rows a program, each read once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qnext_kernels.triton_elementwise import outer_and_inner, pairwise_sum, silu
from qnext_kernels.triton_launch import launch
from qnext_kernels.triton_overlap import overlapping_here, wait_for_launch_in_front
from qnext_kernels.triton_support import aligned_rows, ceil_div, inner_rows, row_tile, vector_of, vector_rows


@triton.jit
def normalised_and_gated(  # type: ignore[no-untyped-def]
    x, z, weight, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x / √(mean(x²) + eps) · weight · SiLU(z) of rows [ROWS, BLOCK] of WIDTH elements and zeros.

    weight: [BLOCK], or [ROWS, BLOCK].
    """
    weight = weight[None, :] if len(weight.shape) == 1 else weight
    scale = tl.rsqrt(pairwise_sum(x * x, ROWS, BLOCK) / WIDTH + eps)
    return x * scale[:, None] * weight * silu(z)


@triton.jit(do_not_specialize=["x_outer", "x_inner", "z_outer", "z_inner", "inner", "rows"])
def gated_rms_norm_kernel(  # type: ignore[no-untyped-def]
    x, z, weight, out, x_outer, x_inner, z_outer, z_inner, inner, rows, eps,
    WIDTH: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """x / √(mean(x²) + eps) · weight · SiLU(z) for ROWS rows.

    Grid: ceil(rows / ROWS). Bytes: x and z read once, out written once.

    Args:
        x, z: rows of WIDTH; their strides count vectors of VECTOR elements.
        weight: contiguous [WIDTH]; out: contiguous [rows, WIDTH], may be x.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < WIDTH)
    outer, within = outer_and_inner(row, inner, rows)
    x_at = (outer * x_outer + within * x_inner)[:, None] * VECTOR + column[None, :]
    z_at = (outer * z_outer + within * z_inner)[:, None] * VECTOR + column[None, :]
    wait_for_launch_in_front(OVERLAPS)
    x_row = tl.load(x + x_at, mask=inside, other=0.0).to(tl.float32)
    z_row = tl.load(z + z_at, mask=inside, other=0.0).to(tl.float32)
    # The weights of every row apart: so a thread has those of its columns and asks no other.
    w_at = tl.zeros([ROWS, 1], tl.int32) + column[None, :]
    w = tl.load(weight + w_at, mask=inside, other=0.0).to(tl.float32)
    y = normalised_and_gated(x_row, z_row, w, eps, WIDTH, ROWS, BLOCK)
    tl.store(out + row.to(tl.int64)[:, None] * WIDTH + column[None, :], y.to(out.dtype.element_ty), mask=inside)


def run_gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """Launch :func:`gated_rms_norm_kernel`; out, contiguous and of the shape of x, is written."""
    width = weight.shape[0]
    if out.numel() == 0:
        return
    vector, rows, config = vector_of(width, x.dtype), out.numel() // width, row_tile(width)
    x, *x_strides = vector_rows(x, vector)
    z, *z_strides = vector_rows(z, vector)
    launch(
        gated_rms_norm_kernel, (ceil_div(rows, config["ROWS"]),),
        x, z, aligned_rows(weight), out, *x_strides, *z_strides, inner_rows(x), rows, eps,
        WIDTH=width, VECTOR=vector, enable_fp_fusion=False, **config, **overlapping_here(),
    )  # fmt: skip
