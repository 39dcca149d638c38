"""The walk in Gluon compiles for Hopper, as the host code launches it, and only there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton

from qnext_kernels.gated_delta_rule import triton_state
from qnext_kernels.gated_delta_rule.context_parallel import TritonContextParallel
from qnext_kernels.gated_delta_rule.triton import TritonGatedDeltaRule
from tests.kernels.triton.ahead_of_time import SHARED_MEMORY, Compiled, compiling_for
from tests.kernels.triton.test_overlap import printed_with

TOKENS, SEQUENCES, DIM = 1000, 3, 128


def prefill(
    backend: TritonGatedDeltaRule,
    arch: str,
    ranks: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    pool: torch.dtype = torch.float32,
    dim: int = DIM,
) -> list[Compiled]:
    """What a prefill compiles on a rank, with snapshots and without."""
    key_heads, value_heads = 16 // ranks, 32 // ranks

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    heads = empty(TOKENS, 2 * key_heads + value_heads, dim, dtype=dtype).split([key_heads, key_heads, value_heads], 1)
    gates = *empty(TOKENS, 2 * value_heads, dtype=dtype).chunk(2, dim=1), empty(value_heads, dtype=torch.float)
    state = empty(100, value_heads, dim, dim, dtype=pool)
    batch = state, empty(SEQUENCES), empty(SEQUENCES + 1), empty(SEQUENCES, dtype=torch.bool)
    with compiling_for(arch) as compiled:
        for snapshots in (None, (empty(SEQUENCES), empty(SEQUENCES))):
            backend.prefill(*heads, *gates, empty(value_heads, dtype=dtype), *batch, snapshots)
    return compiled


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("backend", [TritonGatedDeltaRule(), TritonContextParallel()], ids=lambda backend: backend.name)
def test_it_compiles_and_takes_first_factors_from_registers(backend: TritonGatedDeltaRule, ranks: int) -> None:
    compiled = prefill(backend, "sm_90", ranks)
    segments = [] if type(backend) is TritonGatedDeltaRule else ["transition_kernel", "start_kernel"]
    assert [kernel.name for kernel in compiled] == ["chunk_kernel", *segments, "gluon_walk_kernel", "recurrent_kernel"]
    walk = compiled[-2]
    # Words of what is before the loop.
    assert walk.spilled <= 8
    assert walk.shared <= SHARED_MEMORY["sm_90"]
    assert re.search(r"wgmma\.mma_async\S+ \{[^}]*\}, *\{", walk.assembly)
    assert "ldmatrix.sync.aligned.m8n8.x4.trans" in walk.assembly
    assert "stmatrix.sync.aligned.m8n8.x4.trans" in walk.assembly


@pytest.mark.parametrize(
    ("arch", "other"),
    [
        ("sm_80", {}),
        ("sm_100", {}),
        ("sm_120", {}),
        ("sm_90", {"dtype": torch.float32}),
        ("sm_90", {"pool": torch.bfloat16}),
        ("sm_90", {"dim": 64}),
    ],
    ids=lambda given: given if isinstance(given, str) else "".join(map(str, given)) or "as published",
)
def test_elsewhere_the_walk_is_that_in_triton(arch: str, other: dict[str, Any]) -> None:
    assert [kernel.name for kernel in prefill(TritonGatedDeltaRule(), arch, **other)][1] == "state_kernel"


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0"])
def test_versions_of_triton_that_have_not_compiled_it_do_without(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(triton_state, "_gluon_walk", triton_state._gluon_walk.__wrapped__)
    assert [kernel.name for kernel in prefill(TritonGatedDeltaRule(), "sm_90")][1] == "state_kernel"


def test_a_variable_turns_it_off() -> None:
    script = "import qnext_kernels.gated_delta_rule.triton_state as state; print(state._gluon_allowed)"
    assert [printed_with("QNEXT_GLUON", value, script) for value in ("0", "1")] == ["False", "True"]
