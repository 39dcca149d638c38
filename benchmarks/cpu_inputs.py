"""What a row of ``cpu_ops.py`` is made of: the sizes of Qwen3-Next-80B-A3B, random inputs, the two sides of a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cpu_roof import Call
from torch import Tensor

BF16 = torch.bfloat16
EPS = 1e-6
Pairs = list[tuple[Tensor, Tensor]]


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
    rows: tuple[int, ...] = (2048, 32)
    """Tokens of the elementwise operations, most first: Inductor decides by the first call what to run in parallel."""

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return (2 * self.key_heads + self.value_heads) * self.linear_dim


REAL = Sizes()
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
    rows=(40, 8),
)


@dataclass
class Case:
    """One operation on one shape, ready to run on both sides."""

    peer_name: str
    ours: Call
    peer: Call
    flops: float
    moved: float | None
    """Bytes read and written at least once; None where they stay in cache."""
    states: Callable[[], Pairs] = list
    """What run 0 leaves in place on both sides."""
    comparable: Callable[[Any], Any] = lambda result: result
    """Results in a form in which both sides must agree."""
    retune: Callable[[], None] = lambda: None
    """Called when the number of threads has changed."""
    compiled: bool = False
    """Whether a side is compiled for each number of threads."""


@dataclass
class Row:
    """A line of the table, before its inputs are made."""

    op: str
    shape: str
    build: Callable[[], Case]
    quick: bool = True
    """Whether ``--quick`` has it."""


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
