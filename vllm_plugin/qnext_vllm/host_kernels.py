"""What vLLM lacks, or has wrong, on a CPU without Triton, and speculation on Qwen3-Next needs.

The functions of :data:`HOST_KERNELS` have the names and arguments of Triton kernels and do the same; the decisions
around them stay vLLM's. They take the kernels' places as vLLM's own counterparts for CPUs do.

- With prefix caching vLLM keeps recurrent states at cache-block boundaries (``mamba_cache_mode = "align"``); with
  speculation as well, two kernels of ``vllm.v1.worker.mamba_utils`` copy them. They have no counterpart, and the first
  request takes the engine down.
- ``expand_kernel`` of the rejection sampler spreads temperature, top-k and top-p over the draft tokens. vLLM's
  counterpart writes into a converted copy that it then drops, so that sampling uses uninitialised memory.

One function is wrapped: the rejection sampler's top-k fails on a step without drafts, which ends the engine.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def expand_kernel(
    output_ptr: Tensor,
    input_ptr: Tensor,
    cu_num_tokens_ptr: Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int,
) -> None:
    """Repeat each request's value [batch] for its tokens [tokens], with ``replace_from`` replaced."""
    counts = cu_num_tokens_ptr.diff(prepend=cu_num_tokens_ptr.new_zeros(1))
    values = torch.where(input_ptr == replace_from, replace_to, input_ptr).to(output_ptr.dtype)
    output_ptr.copy_(values.repeat_interleave(counts))


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
        self.columns = (
            base_addresses,
            block_strides,
            element_sizes,
            inner_sizes,
            conv_widths,
            groups,
            row_counts,
            row_strides,
        )
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
    "vllm.v1.sample.rejection_sampler.expand_kernel": expand_kernel,
    "vllm.v1.worker.mamba_utils.precopy_mamba_align_fused_kernel": precopy_mamba_align_fused_kernel,
    "vllm.v1.worker.mamba_utils.postprocess_mamba_fused_kernel": postprocess_mamba_fused_kernel,
}


def _override(name: str, implementation: Callable[..., None]) -> None:
    """Put ``implementation`` in the place of the Triton kernel ``name``, wherever vLLM's modules refer to it.

    With vLLM's own wrapper, but not its ``register_kernels``: that looks into the objects of every library, and
    llvmlite, which n-gram drafts import, has one at which it fails.
    """
    from vllm.triton_utils.dispatcher import KernelOverride

    module_name, attribute = name.rsplit(".", 1)
    original = getattr(importlib.import_module(module_name), attribute)
    override = KernelOverride(original, implementation)
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("vllm."):
            for key, value in list(vars(module).items()):
                if value is original:
                    setattr(module, key, override)
                # What warms a kernel up holds it, and has read its arguments' names.
                elif isinstance(held := getattr(value, "__dict__", None), dict) and held.get("kernel") is original:
                    value.kernel = override
                    held.pop("_kernel_arg_names", None)


@cache
def register_host_kernels() -> None:
    """Put everything here in place; where Triton is there, its kernels run and nothing is done."""
    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.sample import rejection_sampler

    if HAS_TRITON:
        return
    for name, implementation in HOST_KERNELS.items():
        _override(name, implementation)
    apply_top_k_top_p = rejection_sampler.apply_top_k_top_p

    def apply_to_drafts(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
        return apply_top_k_top_p(logits, k, p) if len(logits) else logits

    rejection_sampler.apply_top_k_top_p = apply_to_drafts
