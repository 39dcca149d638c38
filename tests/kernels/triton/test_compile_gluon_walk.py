"""The walk in Gluon compiles for Hopper, as the host code launches it."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

from qnext_kernels.gated_delta_rule import gluon_walk, triton_state
from qnext_kernels.gated_delta_rule.triton import TritonGatedDeltaRule
from tests.kernels.triton.ahead_of_time import SHARED_MEMORY, Compiled, compiling_for

TOKENS, SEQUENCES, DIM = 1000, 3, 128


@pytest.fixture
def walk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """The kernel of a rank, compiled for blocks of values, stages and halves."""
    ranks, block_v, stages, halves = request.param
    options = {"block_v": block_v, "stages": stages, "halves": halves}
    monkeypatch.setattr(gluon_walk, "run_gluon_walk", partial(gluon_walk.run_gluon_walk, **options))
    monkeypatch.setattr(triton_state, "GLUON", True)
    key_heads, value_heads = 16 // ranks, 32 // ranks

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    mixed = empty(TOKENS, 2 * key_heads + value_heads, DIM, dtype=torch.bfloat16)
    gates = *empty(TOKENS, 2 * value_heads, dtype=torch.bfloat16).chunk(2, dim=1), empty(value_heads, dtype=torch.float)
    state = empty(100, value_heads, DIM, DIM, dtype=torch.float32)
    batch = state, empty(SEQUENCES), empty(SEQUENCES + 1), empty(SEQUENCES, dtype=torch.bool)
    heads = mixed.split([key_heads, key_heads, value_heads], dim=1)
    with compiling_for("sm_90") as compiled:
        for snapshots in (None, (empty(SEQUENCES), empty(SEQUENCES))):
            TritonGatedDeltaRule().prefill(*heads, *gates, empty(value_heads, dtype=torch.bfloat16), *batch, snapshots)
    assert [kernel.name for kernel in compiled] == ["chunk_kernel", "gluon_walk_kernel", "recurrent_kernel"]
    return compiled[1]


@pytest.mark.parametrize("walk", [(1, 64, 3, 2), (8, 64, 3, 2), (1, 128, 2, 2)], indirect=True)
def test_it_compiles_and_takes_first_factors_from_registers(walk: Compiled) -> None:
    # A word of what is before the loop.
    assert walk.spilled <= 8
    assert walk.shared <= SHARED_MEMORY["sm_90"]
    assert re.search(r"wgmma\.mma_async\S+ \{[^}]*\}, *\{", walk.assembly)
    assert "ldmatrix.sync.aligned.m8n8.x4.trans" in walk.assembly
    assert "stmatrix.sync.aligned.m8n8.x4.trans" in walk.assembly
