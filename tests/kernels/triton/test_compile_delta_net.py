"""What a Gated DeltaNet layer launches compiles for every GPU we name, and its decode sums as the rule's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qnext_kernels import gated_delta_net_prefill, gated_delta_rule, gated_delta_rule_prefill
from qnext_kernels.dispatch import Call
from qnext_kernels.gated_delta_net.triton_fused import run_fused
from tests.kernels.triton.ahead_of_time import (
    SHARED_MEMORY,
    TARGETS,
    Compiled,
    accesses,
    compiling_for,
    waits_before_it_touches_memory,
)
from tests.kernels.triton.test_compile import SUMS, sums_over_keys

BATCH, COLUMNS, SLOTS, WIDTH, DIM = 8, 4, 100, 4, 128


def compile_fused(
    target: str,
    ranks: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    pool: torch.dtype = torch.float32,
    *,
    joined: bool = False,
) -> list[Compiled]:
    """What decode and verify, in place and into step pools, launch on a rank: one kernel, and one an operation.

    ``joined``: the projections are parts of one.
    """
    key_heads, value_heads = 16 // ranks, 32 // ranks

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def indices(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.int32)

    channels, states = (2 * key_heads + value_heads) * DIM, (value_heads, DIM, DIM)
    state = empty(SLOTS, value_heads * DIM * DIM + 1024, dtype=pool)[:, :-1024].unflatten(1, states)
    conv = empty(SLOTS, WIDTH - 1 + COLUMNS - 1, channels).transpose(1, 2)
    gates = empty(value_heads, dtype=torch.float32), empty(value_heads)
    layer = empty(channels, WIDTH), *gates, empty(DIM), 1e-6, conv, state
    steps = empty(BATCH, COLUMNS, channels, WIDTH - 1), empty(BATCH, COLUMNS, *states, dtype=pool)

    def tokens(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        of_a_head = 2 * DIM + 4 * DIM, 4
        if joined:
            parts = empty(count, key_heads * sum(of_a_head)).split([key_heads * size for size in of_a_head], dim=1)
        else:
            parts = tuple(empty(count, key_heads * size) for size in of_a_head)
        return parts[0].unflatten(1, (key_heads, -1)), parts[1].unflatten(1, (key_heads, -1))

    offsets = indices(BATCH + 1), indices(BATCH)
    with compiling_for(target) as compiled:
        run_fused(*tokens(BATCH), *layer, indices(BATCH, 1))
        run_fused(*tokens(BATCH * 3), *layer, indices(BATCH, COLUMNS), *offsets)
        run_fused(*tokens(BATCH * 3), *layer, indices(BATCH, 1), *offsets, (*steps, indices(BATCH)))
    of_verify = ["verify_kernel", "recurrent_kernel"]
    expected = ["gated_delta_net_kernel", *of_verify, "gated_rms_norm_kernel", *of_verify]
    assert [kernel.name for kernel in compiled] == expected
    return compiled


@pytest.mark.parametrize("target", TARGETS)
def test_a_decode_is_one_kernel_and_nothing_spills(target: str) -> None:
    decode, *others = compile_fused(target)
    for kernel in (decode, *others):
        assert kernel.spilled == 0, kernel[:4]
        assert kernel.shared <= SHARED_MEMORY[target], kernel[:4]
    if target.startswith("sm_"):
        # Two programs of 256 threads fill a multiprocessor.
        assert decode.registers <= 128, decode[:4]
        # What is loaded first of a state, its next rows, and what is stored.
        loads, stores = (accesses(decode, instruction).count("v4.b32") for instruction in ("ld", "st"))
        assert loads == 2 * stores > 0


@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.float16), (4, torch.float32), (8, torch.bfloat16)])
def test_every_rank_of_tensor_parallelism_has_kernels_without_spills(ranks: int, dtype: torch.dtype) -> None:
    assert not any(kernel.spilled for kernel in compile_fused("sm_90", ranks, dtype))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_projections_that_are_parts_of_one_are_read_as_two_are(ranks: int) -> None:
    for one, two in zip(compile_fused("sm_90", ranks, joined=True), compile_fused("sm_90", ranks), strict=True):
        assert sorted(accesses(one, "ld")) == sorted(accesses(two, "ld"))
        assert not one.spilled


@pytest.mark.parametrize(("target", "ranks"), [("sm_90", 1), ("sm_90", 8), ("sm_80", 1), ("gfx942", 1)])
def test_keys_are_summed_in_the_order_of_the_recurrent_kernel(target: str, ranks: int) -> None:
    kernels = [kernel for kernel in compile_fused(target, ranks) if "verify" not in kernel.name]
    assert [sums_over_keys(kernel) for kernel in kernels if "norm" not in kernel.name] == [SUMS] * 3


def test_it_begins_early_and_waits_before_it_touches_memory() -> None:
    assert all(map(waits_before_it_touches_memory, compile_fused("sm_90", 1)))


def test_a_prefill_of_a_layer_and_of_its_rule_ask_for_the_tokens_of_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Call] = []
    select = gated_delta_rule.operation.select

    def recorded(device: torch.device, dtype: torch.dtype, call: Call) -> Any:
        calls.append(call)
        return select(device, dtype, call)

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens, sequences, dim = 150, 3, 16
    pools = empty(5, 3 * dim, 3), empty(5, 1, dim, dim, dtype=torch.float32)
    batch = empty(3, dtype=torch.int32), empty(4, dtype=torch.int32), empty(3, dtype=torch.bool)
    qkvz, ba, gates = empty(tokens, 1, 4 * dim), empty(tokens, 1, 2), (empty(1), empty(1))
    monkeypatch.setattr(gated_delta_rule.operation, "select", recorded)
    with compiling_for("sm_90"):
        gated_delta_net_prefill(qkvz, ba, empty(3 * dim, 4), *gates, empty(dim), 1e-6, *pools, *batch)
        q, k, v = (empty(tokens, 1, dim) for _ in range(3))
        gated_delta_rule_prefill(q, k, v, empty(tokens, 1), empty(tokens, 1), *gates, pools[1], *batch)
    assert [(call.method, call.tokens) for call in calls] == [("prefill", tokens // sequences)] * 2
