"""Every kernel compiles for every GPU we name, at the shapes of the published model, as the host code launches it.

The tensors lie on the meta device: code that read a value on the host, and so waited for a GPU, would fail here.
"""

from __future__ import annotations

import re

import pytest
import torch

from qnext_kernels.gated_delta_rule.triton import TritonGatedDeltaRule
from tests.kernels.triton.ahead_of_time import (
    SHARED_MEMORY,
    TARGETS,
    Compiled,
    accesses,
    compiling_for,
    waits_before_it_touches_memory,
)

pytestmark = pytest.mark.usefixtures("walk_in_triton")

KERNELS = [*3 * ["recurrent_kernel"], "chunk_kernel", "state_kernel", "recurrent_kernel"]
"""Of decode, of both kinds of verify and of a prefill, which ends with the last few tokens."""
BATCH, TOKENS, COLUMNS, SLOTS = 8, 1000, 4, 100


def compile_all(
    target: str, ranks: int = 1, dtype: torch.dtype = torch.bfloat16, pool: torch.dtype = torch.float32
) -> list[Compiled]:
    """What decode, verify (in place and into a step pool) and prefill (with and without snapshots) launch on a rank."""
    key_heads, value_heads, dim = 16 // ranks, 32 // ranks, 128

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def tokens(count: int) -> tuple[torch.Tensor, ...]:
        mixed = empty(count, 2 * key_heads + value_heads, dim)
        q, k, v = mixed.split([key_heads, key_heads, value_heads], dim=1)
        a, b = empty(count, 2 * value_heads).chunk(2, dim=1)
        return q, k, v, a, b, empty(value_heads, dtype=torch.float32), empty(value_heads)

    def indices(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.int32)

    # A page of vLLM: the state of a layer, and the convolution's before the next.
    state = empty(SLOTS, value_heads * dim * dim + 1024, dtype=pool)
    state = state[:, : value_heads * dim * dim].unflatten(1, (value_heads, dim, dim))
    steps = empty(BATCH, COLUMNS, value_heads, dim, dim, dtype=pool), indices(BATCH)
    snapshots = indices(BATCH), indices(BATCH)
    offsets, known = indices(BATCH + 1), empty(BATCH, dtype=torch.bool)
    backend = TritonGatedDeltaRule()
    with compiling_for(target) as compiled:
        backend.decode(*tokens(BATCH), state, indices(BATCH))
        backend.verify(*tokens(BATCH * 3), state, indices(BATCH, COLUMNS), offsets, indices(BATCH))
        backend.verify(*tokens(BATCH * 3), state, indices(BATCH, 1), offsets, indices(BATCH), steps)
        backend.prefill(*tokens(TOKENS), state, indices(BATCH), offsets, known)
        backend.prefill(*tokens(TOKENS), state, indices(BATCH), offsets, known, snapshots)
    return compiled


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spilling_and_fits_into_shared_memory(target: str) -> None:
    compiled = compile_all(target)
    assert [kernel.name for kernel in compiled] == KERNELS
    for kernel in compiled:
        assert kernel.spilled == 0, kernel[:4]
        assert kernel.shared <= SHARED_MEMORY[target], kernel[:4]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_rank_of_tensor_parallelism_has_kernels_without_spills(ranks: int) -> None:
    compiled = compile_all("sm_90", ranks)
    assert [kernel.name for kernel in compiled] == KERNELS
    assert not any(kernel.spilled for kernel in compiled)


@pytest.mark.parametrize(
    ("target", "ranks", "dtype"),
    [
        ("sm_90", 1, torch.float16),
        ("sm_90", 1, torch.float32),
        ("sm_90", 8, torch.float32),
        ("gfx942", 1, torch.float32),
    ],
)
def test_other_dtypes_compile_and_fit_into_shared_memory(target: str, ranks: int, dtype: torch.dtype) -> None:
    compiled = compile_all(target, ranks, dtype)
    assert [kernel.name for kernel in compiled] == KERNELS
    for kernel in compiled:
        # A wave of the GPU of AMD has no registers for the float32 factors of a chunk.
        assert kernel.spilled == 0 or (target, kernel.name) == ("gfx942", "state_kernel"), kernel[:4]
        assert kernel.shared <= SHARED_MEMORY[target], kernel[:4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_token_by_token_states_in_16_bits_do_not_spill(dtype: torch.dtype) -> None:
    compiled = [kernel for kernel in compile_all("sm_90", pool=dtype) if kernel.name == "recurrent_kernel"]
    assert [kernel.spilled for kernel in compiled] == [0] * 4


def of_tokens(target: str, ranks: int = 1, dtype: torch.dtype = torch.bfloat16) -> list[Compiled]:
    """What runs token by token: decode, both kinds of verify, and the last few tokens of a prefill."""
    return [kernel for kernel in compile_all(target, ranks, dtype) if kernel.name == "recurrent_kernel"]


def sums_over_keys(kernel: Compiled) -> list[set[str]]:
    """Of every sum over the keys of a state: how they lie in threads and warps."""
    found = []
    for names in re.findall(r"\(((?:tensor<\d+x32xf32, #\w+>(?:, )?)+)\) -> \(?tensor<\d+xf32", kernel.layouts):
        for name in set(re.findall(r"#\w+", names)):
            layout = re.search(rf"^{name} = (.*)", kernel.layouts, re.MULTILINE)
            assert layout
            sizes = re.findall(r"(sizePerThread|threadsPerWarp|warpsPerCTA) = \[\d+, (\d+)\]", layout[1])
            found.append({f"{key} {size}" for key, size in sizes})
    return found


SUMS = [{"sizePerThread 4", "threadsPerWarp 8", "warpsPerCTA 1"}] * 2
"""With a key and with a query, in one order wherever a token is computed."""


@pytest.mark.parametrize(("target", "ranks"), [("sm_90", 1), ("sm_90", 8), ("sm_80", 1), ("gfx942", 1)])
def test_what_runs_token_by_token_sums_over_keys_in_one_order(target: str, ranks: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert [sums_over_keys(kernel) for kernel in of_tokens(target, ranks, dtype)] == [SUMS] * 4


def test_states_are_loaded_and_stored_in_16_bytes_a_thread() -> None:
    for kernel in of_tokens("sm_90"):
        loads, stores = (accesses(kernel, instruction).count("v4.b32") for instruction in ("ld", "st"))
        assert loads == stores > 0


def test_what_runs_token_by_token_begins_early_and_waits_before_it_touches_memory() -> None:
    assert all(map(waits_before_it_touches_memory, of_tokens("sm_90")))


def test_products_run_on_tensor_cores_and_the_next_chunk_is_loaded_meanwhile() -> None:
    (state,) = (kernel for kernel in compile_all("sm_90") if kernel.name == "state_kernel")
    assert "wgmma.mma_async" in state.assembly
    assert "cp.async" in state.assembly


def test_a_chunk_is_loaded_and_stored_in_16_bytes_and_its_gates_are_computed_once() -> None:
    (chunk,) = (kernel for kernel in compile_all("sm_90") if kernel.name == "chunk_kernel")
    assert "wgmma.mma_async" in chunk.assembly
    # q and k, then M and P, of 64 tokens each, by 128 threads.
    assert chunk.assembly.count("ld.global.v4.b32") == 2 * 64 * 128 // (8 * 128)
    assert chunk.assembly.count("st.global.v4.b32") == 2 * 64 * 64 // (8 * 128)
    assert chunk.layouts.count("math.log ") == 1
    # Of 65536 on a multiprocessor: four programs.
    assert chunk.registers <= 128
