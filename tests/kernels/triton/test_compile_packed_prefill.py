"""What goes around a prefill or a verify by a library that knows no slots compiles for every GPU we name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qnext_kernels.gated_delta_rule.triton_packed import clear_skipped, load_states, normalized, save_states
from tests.kernels.delta_rule_runs import MODEL_SHAPE
from tests.kernels.triton.ahead_of_time import TARGETS, compiling_for


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_compile_without_spilling(target: str) -> None:
    sequences, tokens, (heads, value_dim, key_dim) = 8, 100, MODEL_SHAPE.state

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    pool = empty(50, heads * value_dim * key_dim + 1024, dtype=torch.float32)
    pool = pool[:, : heads * value_dim * key_dim].unflatten(1, (heads, value_dim, key_dim))
    slots, offsets = empty(sequences), empty(sequences + 1)
    steps = empty(sequences, 3, heads, value_dim, key_dim, dtype=torch.float32)
    with compiling_for(target) as compiled:
        normalized(empty(tokens, 4 * heads, key_dim, dtype=torch.bfloat16)[:, :heads])
        packed = load_states(pool, slots, empty(sequences, dtype=torch.bool))
        save_states(packed, pool, slots, offsets)
        clear_skipped(empty(tokens, heads, value_dim, dtype=torch.bfloat16), slots, offsets)
        save_states(steps, pool, empty(sequences, 3), offsets)
    names = ["normalize_kernel", "load_kernel", "save_kernel", "clear_kernel", "save_kernel"]
    assert [kernel.name for kernel in compiled] == names
    assert [kernel.spilled for kernel in compiled] == [0] * len(names)
