"""The kernels around the matrix products compile for every GPU we name, as the host code launches them.

The tensors lie on the meta device: code that read a value on the host, and so waited for a GPU, would fail here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from qnext_kernels.causal_conv1d.triton import TritonCausalConv1d
from qnext_kernels.causal_conv1d.triton_conv import STEPS
from qnext_kernels.gated_attention.triton import TritonGatedAttention
from qnext_kernels.gated_norm.triton import TritonGatedNorm
from qnext_kernels.moe.triton import TritonMoe
from qnext_kernels.rms_norm.triton import TritonRmsNorm
from tests.kernels.triton.ahead_of_time import (
    SHARED_MEMORY,
    TARGETS,
    Compiled,
    accesses,
    compiling_for,
    waits_before_it_touches_memory,
)

N, MANY, T, SLOTS, HIDDEN, EPS = 8, 4096, 1000, 100, 2048, 1e-6


class Rank:
    """What a rank of tensor parallelism launches at the shapes of the published model; every tensor is empty."""

    def __init__(self, ranks: int, dtype: torch.dtype) -> None:
        self.dtype, self.channels, self.key_heads, self.value_heads = dtype, 8192 // ranks, 16 // ranks, 32 // ranks
        self.heads, self.kv_heads, self.intermediate = 16 // ranks, max(1, 2 // ranks), 512 // ranks

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def indices(self, count: int = N) -> Tensor:
        return self.empty(count, dtype=torch.int32)

    def projection(self, tokens: int) -> Tensor:
        """Of every key head q, k and the v of two value heads, which the convolution reads, and beside them z."""
        return self.empty(tokens, self.key_heads, 6 * 128)

    def convolved(self, tokens: int, pool: Tensor) -> tuple[Tensor, ...]:
        x = self.empty(tokens, self.channels + 128)[:, : self.channels]
        return x, self.empty(self.channels, 4), pool, self.indices()

    def channels_last(self) -> Tensor:
        """vLLM's pool, with room for three drafts."""
        return self.empty(SLOTS, 6, self.channels).transpose(1, 2)

    def channels_first(self) -> Tensor:
        return self.empty(SLOTS, self.channels, 3)

    def prefill(self, pool: Tensor, tokens: int = T, grouped: bool = True) -> None:
        x, weight, pool, slots = self.convolved(tokens, pool)
        if grouped:
            x = self.projection(tokens)[:, :, : 4 * 128]
        batch, key_dim = (slots, self.indices(N + 1), self.empty(N, dtype=torch.bool)), 128 if grouped else None
        for snapshots in (None, (self.indices(), self.indices())):
            TritonCausalConv1d().prefill(x, weight, pool, *batch, snapshots, key_dim)

    def decode(self, pool: Tensor, sequences: int = N) -> None:
        TritonCausalConv1d().decode(*self.convolved(sequences, pool)[:3], self.indices(sequences))

    def verify(self, pool: Tensor, in_steps: bool, sequences: int = N) -> None:
        steps = (self.empty(sequences, 4, self.channels, 3), self.indices(sequences)) if in_steps else None
        offsets, indices = self.indices(sequences + 1), self.indices(sequences)
        x, weight, pool, _ = self.convolved(3 * sequences, pool)
        TritonCausalConv1d().verify(x, weight, pool, indices, offsets, indices, steps)

    def rms_norm(self) -> None:
        TritonRmsNorm().rms_norm(self.empty(T, HIDDEN), self.empty(HIDDEN), EPS, None)

    def add_rms_norm(self) -> None:
        TritonRmsNorm().rms_norm(self.empty(T, HIDDEN), self.empty(HIDDEN), EPS, self.empty(T, HIDDEN))

    def gated_norm(self) -> None:
        z = self.projection(T)[:, :, 4 * 128 :].unflatten(2, (2, 128))
        x, weight = self.empty(*z.shape), self.empty(128, dtype=torch.float32)
        TritonGatedNorm().gated_rms_norm(x, z, weight, EPS, x)

    def qk_norm_rope_gate(self) -> None:
        qkv, weight = self.empty(T, 2 * (self.heads + self.kv_heads) * 256), self.empty(256)
        table, positions = self.empty(262144, 64), self.empty(T, dtype=torch.int64)
        TritonGatedAttention().qk_norm_rope_gate(qkv, positions, weight, weight, table, self.heads, self.kv_heads, EPS)

    def sigmoid_gate(self) -> None:
        TritonGatedAttention().sigmoid_gate(*(self.empty(T, self.heads * 256) for _ in range(2)))

    def shared_expert_gate(self) -> None:
        TritonGatedAttention().sigmoid_gate(self.empty(T, HIDDEN), self.empty(T, 1))

    def topk_softmax(self) -> None:
        TritonMoe().topk_softmax(self.empty(T, 512), 10, True)

    def silu_and_mul(self) -> None:
        TritonMoe().silu_and_mul(self.empty(T, 2 * self.intermediate))


SPLIT_BY_RANKS: dict[str, Callable[[Rank], None]] = {
    "prefill": lambda rank: rank.prefill(rank.channels_last()),
    "verify": lambda rank: rank.verify(rank.channels_last(), in_steps=False),
    "verify many": lambda rank: rank.verify(rank.channels_last(), in_steps=False, sequences=MANY),
    "gated norm": Rank.gated_norm,
    "qk norm": Rank.qk_norm_rope_gate,
    "sigmoid gate": Rank.sigmoid_gate,
    "silu and mul": Rank.silu_and_mul,
}
SAME_ON_EVERY_RANK: dict[str, Callable[[Rank], None]] = {
    "rms norm": Rank.rms_norm,
    "add and rms norm": Rank.add_rms_norm,
    "shared expert's gate": Rank.shared_expert_gate,
    "top-k": Rank.topk_softmax,
}
OF_POOLS: dict[str, Callable[[Rank], None]] = {
    "decode": lambda rank: rank.decode(rank.channels_last()),
    "decode many": lambda rank: rank.decode(rank.channels_last(), MANY),
    "decode, channels first": lambda rank: rank.decode(rank.channels_first()),
    "prefill, channels first": lambda rank: rank.prefill(rank.channels_first(), grouped=False),
    "verify into steps": lambda rank: rank.verify(rank.channels_first(), in_steps=True),
}
LAUNCHES = SPLIT_BY_RANKS | SAME_ON_EVERY_RANK | OF_POOLS


def compile_for(target: str, names: Iterable[str], rank: Rank) -> dict[str, Compiled]:
    """The kernel of each of LAUNCHES, which is one whatever its arguments are."""
    compiled = {}
    for name in names:
        with compiling_for(target) as found:
            LAUNCHES[name](rank)
        (compiled[name],) = found
    return compiled


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spilling_and_fits_into_shared_memory(target: str) -> None:
    for kernel in compile_for(target, SPLIT_BY_RANKS | SAME_ON_EVERY_RANK, Rank(1, torch.bfloat16)).values():
        assert kernel.spilled == 0, kernel[:-1]
        assert kernel.shared <= SHARED_MEMORY[target], kernel[:-1]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_rank_of_tensor_parallelism_has_kernels_without_spills(ranks: int) -> None:
    kernels = compile_for("sm_90", SPLIT_BY_RANKS, Rank(ranks, torch.bfloat16))
    assert [kernel.spilled for kernel in kernels.values()] == [0] * len(SPLIT_BY_RANKS)


@pytest.mark.parametrize(("names", "dtype"), [(OF_POOLS, torch.bfloat16), (SPLIT_BY_RANKS, torch.float32)])
def test_other_pools_and_dtypes_compile_without_spills(names: dict[str, object], dtype: torch.dtype) -> None:
    kernels = compile_for("sm_90", names, Rank(1, dtype))
    assert [kernel.spilled for kernel in kernels.values()] == [0] * len(names)


def test_rows_are_read_and_written_in_16_bytes_a_thread() -> None:
    names = ("rms norm", "add and rms norm", "sigmoid gate", "silu and mul")
    for kernel in compile_for("sm_90", names, Rank(1, torch.bfloat16)).values():
        assert set(accesses(kernel, "ld") + accesses(kernel, "st")) == {"v4.b32"}, kernel[:-1]


def test_the_convolution_reads_and_writes_16_bytes_a_thread_where_channels_are_contiguous() -> None:
    kernels = compile_for("sm_90", ["prefill", "decode many"], Rank(1, torch.bfloat16))
    # A thread of a prefill goes along a run of tokens behind three inputs, which lie before them or in the pool.
    assert accesses(kernels["prefill"], "ld").count("v4.b32") == STEPS + 2 * 3
    assert accesses(kernels["prefill"], "st").count("v4.b32") == STEPS
    assert set(accesses(kernels["decode many"], "st")) == {"v4.b32"}


def test_kernels_begin_early_from_sm_90_on_and_wait_before_they_touch_memory() -> None:
    assert all(map(waits_before_it_touches_memory, compile_for("sm_90", LAUNCHES, Rank(1, torch.bfloat16)).values()))
    for kernel in compile_for("sm_80", SAME_ON_EVERY_RANK, Rank(1, torch.bfloat16)).values():
        assert "griddepcontrol" not in kernel.assembly


def test_threads_exchange_nothing_but_sums_of_a_row() -> None:
    rank = Rank(1, torch.bfloat16)
    for kernel in compile_for("sm_90", ("decode", "verify many", "gated norm", "top-k"), rank).values():
        assert kernel.shared == 0, kernel[:-1]


def test_a_sum_over_a_row_is_one_kernel_wherever_the_rows_lie_and_however_many_there_are() -> None:
    rank, weight = Rank(1, torch.bfloat16), torch.empty(128, device="meta")
    wide = rank.empty(T, 300)
    rows = [rank.empty(T, 128), rank.empty(1, 128), wide[:, :128], wide[:, 8:136], wide[:, 3:131], wide[::2, 100:228]]
    heads = rank.empty(T, 3, 384)[:, :, 128:256]
    with compiling_for("sm_90") as compiled:
        for x in (*rows, heads, heads[:1], rank.empty(128)):
            TritonRmsNorm().rms_norm(x, weight, EPS, x)
    assert len(compiled) == 1
    with compiling_for("sm_90") as compiled:
        for x in rows:
            TritonGatedNorm().gated_rms_norm(x, x.flip(0), weight, EPS, torch.empty_like(x))
    assert len(compiled) == 1


def test_the_number_of_tokens_compiles_no_other_convolution() -> None:
    rank = Rank(8, torch.bfloat16)
    with compiling_for("sm_90") as compiled:
        for tokens in (1, 16, 33):
            rank.prefill(rank.channels_last(), tokens)
    assert len(compiled) == 1
