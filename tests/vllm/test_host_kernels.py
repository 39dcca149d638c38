"""The host kernels do what the Triton kernels they stand for are defined to do."""

from __future__ import annotations

import sys

import pytest
import torch

from qnext_vllm.host_kernels import (
    HOST_KERNELS,
    expand_kernel,
    postprocess_mamba_fused_kernel,
    precopy_mamba_align_fused_kernel,
    register_host_kernels,
)

BLOCKS, WIDTH, CHANNELS, HEADS, DIM, BLOCK_SIZE = 12, 5, 6, 2, 4, 8


class Pools:
    """Convolution and recurrent states of two layers in padded pages, and the metadata that describes them."""

    def __init__(self, *, dim_first: bool) -> None:
        shape = (CHANNELS, WIDTH) if dim_first else (WIDTH, CHANNELS)
        self.dim_first = dim_first
        self.conv = [torch.randn(BLOCKS, 100)[:, : WIDTH * CHANNELS].unflatten(1, shape) for _ in range(2)]
        self.state = [torch.randn(BLOCKS, 50)[:, : HEADS * DIM * DIM].unflatten(1, (HEADS, DIM, DIM)) for _ in range(2)]
        self.tables = [torch.randperm(BLOCKS).view(2, 6).int() for _ in range(2)]
        tensors = [*self.conv, *self.state]
        self.metadata = {
            "block_table_ptrs_ptr": torch.tensor([table.data_ptr() for table in self.tables]),
            "block_table_stride_req": self.tables[0].stride(0),
            "state_base_addrs_ptr": torch.tensor([tensor.data_ptr() for tensor in tensors]),
            "state_block_strides_ptr": torch.tensor([tensor.stride(0) * 4 for tensor in tensors]),
            "state_elem_sizes_ptr": torch.full((4,), 4),
            "state_inner_sizes_ptr": torch.tensor([1 if dim_first else CHANNELS] * 2 + [HEADS * DIM * DIM] * 2),
            "state_conv_widths_ptr": torch.tensor([WIDTH, WIDTH, 0, 0]),
            "state_group_indices_ptr": torch.tensor([0, 1, 0, 1]),
            "state_dim_row_count_ptr": torch.tensor([CHANNELS, CHANNELS, 0, 0]),
            "state_dim_row_stride_ptr": torch.tensor([WIDTH * 4, WIDTH * 4, 0, 0]),
            "COPY_BLOCK_SIZE": 1024,
            "CONV_STATE_DIM_FIRST": dim_first,
        }

    def snapshot(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in (*self.conv, *self.state)]

    def expect_copy(self, before: list[torch.Tensor], request: int, source: int, target: int, bias: int) -> None:
        """Apply to ``before`` what a copy should do."""
        for layer in range(2):
            table = self.tables[layer][request].tolist()
            conv, state = before[layer], before[2 + layer]
            window = conv[table[source]].clone()
            if self.dim_first:
                conv[table[target], :, : WIDTH - bias] = window[:, bias:]
            else:
                conv[table[target], : WIDTH - bias] = window[bias:]
            state[table[target]] = state[table[source + bias]].clone()

    def equals(self, expected: list[torch.Tensor]) -> bool:
        pairs = zip(self.snapshot(), expected, strict=True)
        return all(torch.equal(ours, want) for ours, want in pairs)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dim_first", [False, True])
@pytest.mark.parametrize("bias", [0, 1, 2])
def test_precopy_moves_states_to_the_new_block_and_leaves_the_others(dim_first: bool, bias: int) -> None:
    pools = Pools(dim_first=dim_first)
    expected = pools.snapshot()
    pools.expect_copy(expected, request=1, source=1, target=3, bias=bias)
    # Request 0 stays in its block; with source −1 it would be fresh. Neither is touched.
    precopy_mamba_align_fused_kernel(
        mamba_state_idx_ptr=ints(2, 3),
        src_col_ptr=ints(2, 1),
        token_bias_ptr=ints(1, bias),
        idx_mapping_ptr=None,
        num_reqs=2,
        HAS_IDX_MAPPING=False,
        **pools.metadata,
    )
    assert pools.equals(expected)


def test_precopy_skips_fresh_requests_and_padding() -> None:
    pools = Pools(dim_first=False)
    expected = pools.snapshot()
    precopy_mamba_align_fused_kernel(
        mamba_state_idx_ptr=ints(0, 3),
        src_col_ptr=ints(-1, 1),
        token_bias_ptr=ints(0, 0),
        idx_mapping_ptr=ints(0, -1),
        num_reqs=2,
        **pools.metadata,
    )
    assert pools.equals(expected)


@pytest.mark.parametrize("dim_first", [False, True])
def test_postprocess_keeps_the_state_at_the_block_boundary(dim_first: bool) -> None:
    pools = Pools(dim_first=dim_first)
    expected = pools.snapshot()
    accepted = ints(3, 1)
    out = accepted.clone()
    # Request 0: 14 tokens computed, 1 + 2 drafts scheduled, all accepted: 17 reach beyond the boundary at 16. Its
    # running state, behind token 15, is in block 2; the state behind token 16, one column on, belongs to block 1.
    pools.expect_copy(expected, request=0, source=2, target=1, bias=1)
    postprocess_mamba_fused_kernel(
        num_accepted_tokens_ptr=accepted,
        mamba_state_idx_ptr=ints(2, 0),
        num_scheduled_tokens_ptr=ints(3, 1),
        num_computed_tokens_ptr=ints(14, 3),
        num_draft_tokens_ptr=ints(2, 0),
        num_accepted_tokens_out_ptr=out,
        idx_mapping_ptr=None,
        num_reqs=2,
        block_size=BLOCK_SIZE,
        **pools.metadata,
    )
    assert pools.equals(expected)
    assert out.tolist() == [3, 1]


def test_postprocess_within_the_block_resets_the_accepted_count() -> None:
    pools = Pools(dim_first=False)
    expected = pools.snapshot()
    pools.expect_copy(expected, request=0, source=1, target=1, bias=1)
    out = ints(3)
    postprocess_mamba_fused_kernel(
        num_accepted_tokens_ptr=ints(3),
        mamba_state_idx_ptr=ints(1),
        num_scheduled_tokens_ptr=ints(3),
        num_computed_tokens_ptr=ints(14),
        num_draft_tokens_ptr=ints(2),
        num_accepted_tokens_out_ptr=out,
        idx_mapping_ptr=None,
        num_reqs=1,
        block_size=BLOCK_SIZE,
        **pools.metadata,
    )
    assert pools.equals(expected)
    assert out.tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_expand_repeats_each_value_for_its_tokens(dtype: torch.dtype) -> None:
    output = torch.full((5,), 99).to(dtype)
    values = torch.tensor([0.0, 7.0, 2.0]).to(dtype)
    expand_kernel(output, values, ints(2, 2, 5), replace_from=0, replace_to=1, MAX_NUM_TOKENS=32)
    assert output.tolist() == [1, 1, 2, 2, 2]


def test_vllm_launches_the_host_kernels() -> None:
    import llvmlite.binding  # n-gram drafts do; vLLM's own registration fails at an object in it  # noqa: F401
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    register_host_kernels()
    for name, kernel in HOST_KERNELS.items():
        module, _, attribute = name.rpartition(".")
        assert getattr(sys.modules[module], attribute)[(1,)].__self__.func is kernel
    expanded = expand_batch_to_tokens(torch.tensor([0.5, 0.25]), ints(1, 3), 3)
    assert expanded.tolist() == [0.5, 0.25, 0.25]
