"""A prefill in the deterministic mode compiles for every GPU we name, and sums as a decode does."""

from __future__ import annotations

import re

import pytest
import torch

from qnext_kernels.dispatch import deterministic
from tests.kernels.triton.ahead_of_time import SHARED_MEMORY, TARGETS, Compiled
from tests.kernels.triton.test_compile import SUMS, compile_all, sums_over_keys


def compiled_in_the_mode(
    target: str, ranks: int = 1, dtype: torch.dtype = torch.bfloat16, pool: torch.dtype = torch.float32
) -> Compiled:
    with deterministic():
        *recurrent, walk = compile_all(target, ranks, dtype, pool)
    assert [kernel.name for kernel in recurrent] == ["recurrent_kernel"] * 3
    assert walk.name == "walk_kernel"
    return walk


@pytest.mark.parametrize("target", TARGETS)
def test_every_prefill_is_one_kernel_that_does_not_spill(target: str) -> None:
    walk = compiled_in_the_mode(target)
    assert walk.spilled == 0, walk[:4]
    assert walk.shared <= SHARED_MEMORY[target], walk[:4]


@pytest.mark.parametrize(
    ("target", "ranks", "dtype"),
    [
        ("sm_90", 1, torch.bfloat16),
        ("sm_90", 2, torch.float16),
        ("sm_90", 4, torch.float32),
        ("sm_90", 8, torch.bfloat16),
        ("sm_80", 1, torch.bfloat16),
        ("gfx942", 1, torch.bfloat16),
    ],
)
def test_keys_are_summed_in_the_order_of_a_decode_on_every_rank(target: str, ranks: int, dtype: torch.dtype) -> None:
    walk = compiled_in_the_mode(target, ranks, dtype)
    assert sums_over_keys(walk) == SUMS
    assert walk.spilled == 0


@pytest.mark.parametrize("pool", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_in_16_bits_do_not_spill_either(dtype: torch.dtype, pool: torch.dtype) -> None:
    walk = compiled_in_the_mode("sm_90", dtype=dtype, pool=pool)
    assert walk.spilled == 0, walk[:4]
    assert sums_over_keys(walk) == SUMS


def test_what_is_loaded_of_a_token_is_first_used_two_tokens_later() -> None:
    """So that one latency of memory is not waited for at every token."""
    walk = compiled_in_the_mode("sm_90")
    loop = walk.layouts[walk.layouts.index("scf.for") :]
    yielded = re.search(r"scf\.yield (%.*?) :", loop)
    assert yielded
    loaded = re.findall(r"(%\S+) = tt\.load", loop)
    assert len(loaded) == 4 + 4 + 3  # Parts of q and of k; v, a and b.
    for name in loaded:
        assert re.findall(rf"{name}\b(?! =)", loop) == re.findall(rf"{name}\b", yielded[1]) == [name]
