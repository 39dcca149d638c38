"""The kernels of a prefill in segments compile for every GPU we name, at the shapes of the published model."""

from __future__ import annotations

import pytest
import torch

from qnext_kernels.gated_delta_rule.context_parallel import TritonContextParallel
from tests.kernels.triton.ahead_of_time import SHARED_MEMORY, TARGETS, Compiled, compiling_for

pytestmark = pytest.mark.usefixtures("walk_in_triton")

KERNELS = ["chunk_kernel", "transition_kernel", "start_kernel", "segment_kernel", "recurrent_kernel"]


def compile_prefill(target: str, ranks: int = 1, dtype: torch.dtype = torch.bfloat16) -> list[Compiled]:
    """What a prefill launches on a rank of the published model, with and without snapshots."""
    key_heads, value_heads, dim, tokens, sequences = 16 // ranks, 32 // ranks, 128, 5000, 3

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    mixed = empty(tokens, 2 * key_heads + value_heads, dim, dtype=dtype)
    gates = *empty(tokens, 2 * value_heads, dtype=dtype).chunk(2, dim=1), empty(value_heads, dtype=torch.float32)
    heads = mixed.split([key_heads, key_heads, value_heads], dim=1)
    state = empty(100, value_heads, dim, dim, dtype=torch.float32)
    batch = state, empty(sequences), empty(sequences + 1), empty(sequences, dtype=torch.bool)
    with compiling_for(target) as compiled:
        for snapshots in (None, (empty(sequences), empty(sequences))):
            TritonContextParallel().prefill(*heads, *gates, empty(value_heads, dtype=dtype), *batch, snapshots)
    return compiled


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spilling_and_fits_into_shared_memory(target: str) -> None:
    compiled = compile_prefill(target)
    assert [kernel.name for kernel in compiled] == KERNELS
    for kernel in compiled:
        assert kernel.spilled == 0, kernel[:4]
        assert kernel.shared <= SHARED_MEMORY[target], kernel[:4]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_rank_of_tensor_parallelism_has_kernels_without_spills(ranks: int) -> None:
    assert [(kernel.name, kernel.spilled) for kernel in compile_prefill("sm_90", ranks)] == [
        (name, 0) for name in KERNELS
    ]


@pytest.mark.parametrize(
    ("target", "dtype"), [("sm_90", torch.float32), ("sm_90", torch.float16), ("gfx942", torch.float32)]
)
def test_other_dtypes_compile_and_fit_into_shared_memory(target: str, dtype: torch.dtype) -> None:
    compiled = compile_prefill(target, ranks=8, dtype=dtype)
    assert [kernel.name for kernel in compiled] == KERNELS
    assert all(kernel.shared <= SHARED_MEMORY[target] for kernel in compiled)
    if target == "sm_90":
        # The assembler of Triton 3.9 keeps one address of a tail in memory.
        allowed = [8 if kernel.name == "segment_kernel" and dtype == torch.float32 else 0 for kernel in compiled]
        assert all(kernel.spilled <= most for kernel, most in zip(compiled, allowed, strict=True))


def test_two_programs_of_the_widest_walk_share_a_multiprocessor_and_load_the_next_chunk_meanwhile() -> None:
    _, transition, start, segment, _ = compile_prefill("sm_90", ranks=8)
    # The states before segments have 16 rows a program, too few for the products of four warps.
    assert ["wgmma.mma_async" in kernel.assembly for kernel in (transition, start, segment)] == [True, False, True]
    assert all("cp.async" in kernel.assembly for kernel in (transition, start, segment))
    reserved, registers = 1 << 10, 1 << 16
    assert 2 * (transition.shared + reserved) <= SHARED_MEMORY["sm_90"] + reserved
    assert 2 * 128 * transition.registers <= registers
