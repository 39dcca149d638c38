"""Of a cache block all is copied, whichever layer's view of it comes first."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

from qnext_vllm.block_copies import copy_whole_blocks

BLOCKS = 6


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_largest_view_is_copied(order: tuple[int, int]) -> None:
    memory = torch.randn(2, BLOCKS, 64)
    before = memory.clone()
    views = memory[0, :, :20], memory[0]  # as of a state, and of keys and values, in one of several tensors
    copy_whole_blocks()
    gpu_model_runner.copy_kv_cache_blocks_inplace([views[n] for n in order], BLOCKS, [(2, 4), (0, 5)])
    before[0, 4], before[0, 5] = before[0, 2].clone(), before[0, 0].clone()
    assert torch.equal(memory, before)


def test_vllm_itself_still_copies_what_the_first_view_holds() -> None:
    """Else nothing needs to be wrapped any more."""
    memory = torch.randn(2, BLOCKS, 64)
    copy_kv_cache_blocks_inplace([memory[0, :, :20], memory[0]], BLOCKS, [(2, 4)])
    assert torch.equal(memory[0, 4, :20], memory[0, 2, :20])
    assert not torch.equal(memory[0, 4], memory[0, 2])
