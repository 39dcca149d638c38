"""What a row of a kernel benchmark is made of: the sizes of Qwen3-Next-80B-A3B, random inputs, the sides of a case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qnext_plugins.cli.bench.roofs import Call

BF16 = torch.bfloat16
EPS = 1e-6
ROPE_THETA = 1e7
TOLERANCE = 2 * torch.finfo(BF16).eps
"""Of the norm of the difference of two results in bfloat16, relative: its rounding, once in between and at the end."""
PART = 512
"""Tokens that the reference computes of a row that would take it minutes."""
STEP = 1024
"""The most tokens of a step that an engine replays from a CUDA graph."""
BLOCK_SIZE = 128
"""Tokens of a block of the paged cache, vLLM's default on a CPU."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model's layers and of the calls."""

    hidden: int = 2048
    key_heads: int = 16
    value_heads: int = 32
    linear_dim: int = 128
    conv_width: int = 4
    drafts: int = 2
    experts: int = 512
    top_k: int = 10
    intermediate: int = 512
    heads: int = 16
    kv_heads: int = 2
    head_dim: int = 256
    rotary_dim: int = 64
    vocabulary: int = 151936
    expert_tokens: tuple[int, ...] = (1, 8, 32, 512, 2048, 8192)
    prefills: tuple[int, ...] = (512, 2048, 8192)
    conv_prefills: tuple[int, ...] = (2048, 8192)
    contexts: tuple[int, ...] = (8192, 65536)
    batches: tuple[int, ...] = (1, 8, 32)
    packed: tuple[tuple[int, ...], ...] = ()
    """Prefills of Gated DeltaNet over several sequences: their lengths."""
    prefills_alone: tuple[int, ...] = ()
    """Prefills of the delta rule with a snapshot, and in the deterministic mode, beside no library."""
    linear_tokens: tuple[int, ...] = (1, 2, 3, 4)
    rows: tuple[int, ...] = (2048, 32)
    """Tokens of the elementwise operations, most first: Inductor decides by the first call what to run in parallel."""

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return (2 * self.key_heads + self.value_heads) * self.linear_dim

    def shard(self, ranks: int) -> Sizes:
        """What one of ``ranks`` tensor-parallel ranks has; raises ValueError if they cannot divide the heads."""
        if ranks < 1 or any(size % ranks for size in (self.key_heads, self.heads, self.intermediate, self.vocabulary)):
            raise ValueError(f"expected a number of ranks that divides {self.key_heads} heads, got {ranks}")
        return replace(
            self,
            key_heads=self.key_heads // ranks,
            value_heads=self.value_heads // ranks,
            intermediate=self.intermediate // ranks,
            heads=self.heads // ranks,
            kv_heads=max(1, self.kv_heads // ranks),
            vocabulary=self.vocabulary // ranks,
        )


def ragged(sequences: int, mean: int) -> tuple[int, ...]:
    """Lengths of so many sequences, from nearly none to nearly twice the mean: they rise, then fall."""
    step = 2 * mean / (sequences + 1)
    ends = [round(step * n * (n + 1) / 2) for n in range(sequences + 1)]
    lengths = [end - start for start, end in pairwise(ends)]
    return tuple(lengths[::2] + lengths[1::2][::-1])


REAL = Sizes()
GPU = Sizes(
    expert_tokens=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384),
    prefills=(2048, 4096, 8192, 16384, 32768, 65536),
    conv_prefills=(2048, 8192, 65536),
    packed=(ragged(16, 2048), ragged(64, 512)),
    prefills_alone=(2048,),
    batches=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    linear_tokens=(1, 8, 64, 256, 1024),
    rows=(8192, 1024, 256, 64, 16, 1),
)
"""What a GPU is asked for: batches up to 1024, sequences up to 65536 tokens."""
GPU_QUICK = Sizes(
    expert_tokens=(1, 64, 4096),
    prefills=(2048, 8192),
    conv_prefills=(8192,),
    packed=(ragged(16, 2048),),
    prefills_alone=(2048,),
    contexts=(8192,),
    batches=(1, 32, 256),
    linear_tokens=(1, 64),
    rows=(8192, 64),
)
GPU_FIRST = replace(
    GPU_QUICK,
    expert_tokens=(64, 1024),
    prefills=(8192, 65536),
    conv_prefills=(2048, 8192, 65536),
    batches=(64, 1024),
    linear_tokens=(64,),
)
"""Of :data:`GPU`, what comes first where the time may not be enough for all."""
TINY = Sizes(
    hidden=256,
    experts=24,
    intermediate=64,
    vocabulary=512,
    expert_tokens=(1, 8, 70),
    prefills=(70,),
    conv_prefills=(70,),
    contexts=(300,),
    batches=(1, 3),
    packed=((65, 4, 1, 30),),
    rows=(40, 8),
)


@dataclass
class Side:
    """One implementation of a case, ready to run."""

    name: str
    """Of the kernel behind it."""
    call: Call
    states: Callable[[], list[Tensor]] = list
    """What run 0 leaves in place, in the layout of ours."""
    retune: Callable[[], None] = lambda: None
    """Called when the number of threads has changed."""
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    """What the call runs in; entering it is not timed."""


@dataclass
class Part:
    """A part of a case that stands for the whole where the reference would take minutes."""

    ours: Callable[[], tuple[Tensor, ...]]
    """Ours on that part of the inputs; called with the reference as backend."""
    of: Callable[..., tuple[Tensor, ...]]
    """The same part of what run 0 of the whole gives: results, then states."""


@dataclass
class Case:
    """One operation on one shape, ready to run on all sides, which get the same inputs."""

    ours: Call
    peers: dict[str, Side]
    """By the name of their library; those that have the operation."""
    flops: float
    moved: float | None
    """Bytes read and written at least once; None where they stay in cache."""
    sets: int = 1
    """How many inputs take turns."""
    part: Part | None = None
    compute: str = "bf16"
    """The dtype of the matrix products' operands, bf16 or fp8."""
    tolerance: float = TOLERANCE
    """Of the norm of the difference of two sides, relative."""
    pools: tuple[Tensor, ...] = ()
    """State of ours that a run changes."""
    states: Callable[[], list[Tensor]] = list
    """What run 0 of ours leaves in place."""
    comparable: Callable[[Any], Any] = lambda result: result
    """Results in a form in which all sides must agree."""
    compiled: bool = False
    """Whether a side is compiled for each number of threads."""


@dataclass
class Row:
    """A line of the table, before its inputs are made."""

    op: str
    shape: str
    build: Callable[[], Case]
    operation: str
    """Of :data:`qnext_kernels.OPERATIONS`, whose backends can serve it."""
    parts: tuple[str, ...] = ()
    """Further operations that it is made of, all of which a backend must serve."""
    quick: bool = True
    """Whether ``--quick`` has it."""
    heavy: bool = False
    """Whether the reference, which goes token by token, would take minutes."""
    stepped: bool = False
    """Whether it is part of a step of decode, which a GPU replays from a CUDA graph."""
    borrowed: tuple[str, ...] = ()
    """Backends that have another's kernel here, and are left out."""

    @property
    def operations(self) -> tuple[str, ...]:
        """All that it is made of."""
        return self.operation, *self.parts

    def forcing(self, backend: str) -> str:
        """What :func:`qnext_kernels.force_backend` takes to have it computed by one backend."""
        return ",".join(f"{name}={backend}" for name in self.operations)


class Library:
    """Another library's kernels beside ours: a peer. Each method gives None where it has no such operation."""

    name: str
    version: str
    compiled_by_triton = True
    """Whether what it compiles itself are kernels that it launches through Triton."""

    def experts(self, w13: Tensor, w2: Tensor) -> tuple[str, Callable[[Tensor, Tensor, Tensor, Tensor], Any]] | None:
        """Routed experts: f(out, x, weights, ids), which writes ``out`` or returns another."""

    def experts_fp8(
        self, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor
    ) -> tuple[str, Callable[[Tensor, Tensor, Tensor, Tensor], Any]] | None:
        """The same over weights in e4m3 with a scale a block of 128 × 128."""

    def attention(self, key: Tensor, value: Tensor, queries: int, heads: int) -> Any:
        """An object with ``name``, ``schedule()`` and ``(query, out)``: ``queries`` tokens at the end of the keys."""

    def linear(self, weight: Tensor) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        """An unquantized linear layer [N, K]: f(x)."""

    def convolution(self, weight: Tensor, pool: Tensor, heads: tuple[int, int, int]) -> Any:
        """An object with ``name``, ``convolve``, ``verify``, over a pool [slots, state_len, channels] of its own."""

    def delta_rule(self, heads: tuple[int, int, int]) -> Any:
        """An object with ``prefill``, ``decode``, ``verify`` and their ``names``, over a pool of its own.

        ``key_first`` says whether that is [slots, HV, K, V] or, as ours, [slots, HV, V, K].
        """

    def rms_norm(self, weight: Tensor, eps: float) -> tuple[str, Callable[..., Any]] | None:
        """Zero-centred RMSNorm: f(x, residual)."""

    def gated_rms_norm(self, weight: Tensor, eps: float) -> tuple[str, Callable[..., Any]] | None:
        """Gated RMSNorm: f(x, z)."""

    def silu_and_mul(self) -> tuple[str, Callable[..., Any]] | None:
        """SwiGLU's middle: f(x)."""

    def sigmoid_gate(self) -> tuple[str, Callable[..., Any]] | None:
        """The output gate of attention: f(x, gate)."""

    def topk_softmax(self, top_k: int) -> tuple[str, Callable[..., Any]] | None:
        """The router of the experts: f(logits) → weights, ids, in any order."""

    def qk_norm_rope_gate(
        self, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int, rotary_dim: int, positions: int, eps: float
    ) -> tuple[str, Callable[..., Any]] | None:
        """What goes before attention, with RoPE of base :data:`ROPE_THETA` for so many positions: f(qkv, positions)."""

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of PyTorch's operators as the library compiles it inside a model."""
        return function


def sides_of(libraries: Sequence[Library], make: Callable[[Library], Side | None]) -> dict[str, Side]:
    """The side of each library that has the operation.

    One that cannot be made is there too, and its call raises the reason: it is reported, and the others are timed.
    """
    sides = {}
    for library in libraries:
        try:
            side = make(library)
        except Exception as error:
            side = Side("not made", partial(_raise, error))
        if side is not None:
            sides[library.name] = side
    return sides


class PerTensor:
    """Something that is made once of each tensor: offsets in another dtype, a copy that a peer may write over."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        self._make = make
        self._made: dict[int, tuple[Tensor, Any]] = {}

    def __call__(self, tensor: Tensor) -> Any:
        if id(tensor) not in self._made:
            self._made[id(tensor)] = tensor, self._make(tensor)
        return self._made[id(tensor)][1]


def _raise(error: Exception, turn: int) -> None:
    raise error


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """Random bfloat16 numbers; large tensors repeat a block of them, at no period that a layer has."""
    out = torch.empty(shape, dtype=BF16)
    block = (torch.randn(min(out.numel(), (1 << 22) - 3)) * scale).to(BF16)
    flat = out.view(-1)
    for start in range(0, flat.numel(), block.numel()):
        flat[start : start + block.numel()] = block[: flat.numel() - start]
    return out


def int32(values: Any) -> Tensor:
    return torch.as_tensor(values).to(torch.int32)
