"""The state copies of prefix caching, on a CPU.

With prefix caching vLLM keeps recurrent states at cache-block boundaries (``mamba_cache_mode = "align"``) and copies
them with three Triton kernels of ``vllm.v1.worker.mamba_utils``. Without Triton those are plain functions that cannot
be launched, and the first request that crosses a block (with speculation: the first request) takes the engine down. The
functions here have their names and arguments and do the same copies with memmove; the decisions around them stay
vLLM's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from torch import Tensor


class HostKernel:
    """A function that is launched as a Triton kernel is, ``kernel[grid](...)``; it walks its own grid."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.function


def batch_memcpy_kernel(src_ptrs: Tensor, dst_ptrs: Tensor, sizes: Tensor, BLOCK_SIZE: int) -> None:
    """Copy ``sizes[i]`` bytes from address ``src_ptrs[i]`` to ``dst_ptrs[i]``; regions may overlap."""
    for source, target, size in zip(src_ptrs.tolist(), dst_ptrs.tolist(), sizes.tolist(), strict=True):
        ctypes.memmove(target, source, size)


def precopy_mamba_align_fused_kernel(
    mamba_state_idx_ptr: Tensor,
    src_col_ptr: Tensor,
    token_bias_ptr: Tensor,
    block_table_ptrs_ptr: Tensor,
    block_table_stride_req: int,
    state_base_addrs_ptr: Tensor,
    state_block_strides_ptr: Tensor,
    state_elem_sizes_ptr: Tensor,
    state_inner_sizes_ptr: Tensor,
    state_conv_widths_ptr: Tensor,
    state_group_indices_ptr: Tensor,
    state_dim_row_count_ptr: Tensor,
    state_dim_row_stride_ptr: Tensor,
    idx_mapping_ptr: Tensor | None,
    num_reqs: int,
    COPY_BLOCK_SIZE: int,
    CONV_STATE_DIM_FIRST: bool,
    HAS_IDX_MAPPING: bool = True,
    TEMPORAL_TILES: int = 1,
) -> None:
    """Before a step: bring each request's state from its last block to the block that the step writes."""
    states = _StateBlocks(
        block_table_ptrs_ptr,
        block_table_stride_req,
        state_base_addrs_ptr,
        state_block_strides_ptr,
        state_elem_sizes_ptr,
        state_inner_sizes_ptr,
        state_conv_widths_ptr,
        state_group_indices_ptr,
        state_dim_row_count_ptr,
        state_dim_row_stride_ptr,
        CONV_STATE_DIM_FIRST,
    )
    for request in _requests(num_reqs, idx_mapping_ptr if HAS_IDX_MAPPING else None):
        source, target = int(src_col_ptr[request]), int(mamba_state_idx_ptr[request])
        if source >= 0 and source != target:
            states.copy(request, source, target, int(token_bias_ptr[request]))


def postprocess_mamba_fused_kernel(
    num_accepted_tokens_ptr: Tensor,
    mamba_state_idx_ptr: Tensor,
    num_scheduled_tokens_ptr: Tensor | None,
    num_computed_tokens_ptr: Tensor,
    num_draft_tokens_ptr: Tensor | None,
    block_table_ptrs_ptr: Tensor,
    block_table_stride_req: int,
    state_base_addrs_ptr: Tensor,
    state_block_strides_ptr: Tensor,
    state_elem_sizes_ptr: Tensor,
    state_inner_sizes_ptr: Tensor,
    state_conv_widths_ptr: Tensor,
    state_group_indices_ptr: Tensor,
    state_dim_row_count_ptr: Tensor,
    state_dim_row_stride_ptr: Tensor,
    num_accepted_tokens_out_ptr: Tensor,
    idx_mapping_ptr: Tensor | None,
    num_reqs: int,
    block_size: int,
    COPY_BLOCK_SIZE: int,
    CONV_STATE_DIM_FIRST: bool,
    HAS_IDX_MAPPING: bool = False,
    PRECOMPUTED_NEW_COMPUTED: bool = False,
    TEMPORAL_TILES: int = 1,
) -> None:
    """After a step: where accepted tokens reach a block boundary, keep the state there for the cache."""
    states = _StateBlocks(
        block_table_ptrs_ptr,
        block_table_stride_req,
        state_base_addrs_ptr,
        state_block_strides_ptr,
        state_elem_sizes_ptr,
        state_inner_sizes_ptr,
        state_conv_widths_ptr,
        state_group_indices_ptr,
        state_dim_row_count_ptr,
        state_dim_row_stride_ptr,
        CONV_STATE_DIM_FIRST,
    )
    for request in _requests(num_reqs, idx_mapping_ptr if HAS_IDX_MAPPING else None):
        accepted, source = int(num_accepted_tokens_ptr[request]), int(mamba_state_idx_ptr[request])
        computed = int(num_computed_tokens_ptr[request])
        if PRECOMPUTED_NEW_COMPUTED:
            running = computed - accepted + 1
        else:
            assert num_scheduled_tokens_ptr is not None
            assert num_draft_tokens_ptr is not None
            running = computed + int(num_scheduled_tokens_ptr[request]) - int(num_draft_tokens_ptr[request])
            computed = running + accepted - 1
        aligned = computed // block_size * block_size
        if aligned < running:
            continue
        target, bias = aligned // block_size - 1, aligned - running
        if source == target:
            num_accepted_tokens_out_ptr[request] = 1
        if source != target or bias:
            states.copy(request, source, target, bias)


def _requests(num_reqs: int, idx_mapping: Tensor | None) -> list[int]:
    if idx_mapping is None:
        return list(range(num_reqs))
    return [request for request in idx_mapping[:num_reqs].tolist() if request >= 0]


class _StateBlocks:
    """The states of all layers as addresses; one entry a layer and kind of state."""

    def __init__(
        self,
        block_table_addresses: Tensor,
        block_table_stride: int,
        base_addresses: Tensor,
        block_strides: Tensor,
        element_sizes: Tensor,
        inner_sizes: Tensor,
        conv_widths: Tensor,
        groups: Tensor,
        row_counts: Tensor,
        row_strides: Tensor,
        conv_dim_first: bool,
    ) -> None:
        self.tables = block_table_addresses
        self.table_stride = block_table_stride
        columns = (
            base_addresses,
            block_strides,
            element_sizes,
            inner_sizes,
            conv_widths,
            groups,
            row_counts,
            row_strides,
        )
        self.columns = columns
        self.conv_dim_first = conv_dim_first

    def copy(self, request: int, source_column: int, target_column: int, bias: int) -> None:
        """Copy every state of ``request`` between two columns of its block tables.

        ``bias`` accepted tokens lie between the running state and the one wanted: a window of convolution inputs moves
        on by that many, a recurrent state is the one in that many columns further on.
        """
        tables = [address + 4 * request * self.table_stride for address in self.tables.tolist()]
        for base, stride, element, inner, width, group, rows, row_stride in zip(
            *(column.tolist() for column in self.columns), strict=True
        ):
            column = source_column if width else source_column + bias
            source = base + stride * ctypes.c_int32.from_address(tables[group] + 4 * column).value
            target = base + stride * ctypes.c_int32.from_address(tables[group] + 4 * target_column).value
            if not width:
                ctypes.memmove(target, source, inner * element)
            elif self.conv_dim_first:
                for row in range(rows):
                    at = row * row_stride
                    ctypes.memmove(target + at, source + at + bias * element, (width - bias) * element)
            else:
                ctypes.memmove(target, source + bias * inner * element, (width - bias) * inner * element)


HOST_KERNELS: dict[str, Callable[..., None]] = {
    "batch_memcpy_kernel": batch_memcpy_kernel,
    "precopy_mamba_align_fused_kernel": precopy_mamba_align_fused_kernel,
    "postprocess_mamba_fused_kernel": postprocess_mamba_fused_kernel,
}


def install_align_copy() -> None:
    """Put the host kernels where vLLM without Triton has functions that cannot be launched; elsewhere do nothing."""
    from vllm.v1.worker import mamba_utils

    for name, function in HOST_KERNELS.items():
        kernel: Any = getattr(mamba_utils, name)
        if not hasattr(kernel, "__getitem__"):
            setattr(mamba_utils, name, HostKernel(function))
