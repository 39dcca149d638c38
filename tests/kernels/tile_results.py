"""What the kernels that use AMX compute.

``python -m tests.kernels.tile_results FILE`` writes it, as the instruction set in QNEXT_ISA has it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from qnext_kernels import force_backend, linear
from qnext_kernels.fp8 import FP8
from qnext_kernels.integers import INT4, INT8
from tests.kernels.integer_inputs import random_weight
from tests.kernels.test_paged_attention import SHAPES, attend, random_tokens

TOKENS = (1, 3, 4, 16, 17, 33, 70)
"""Few, those of one tile, of two, and of more."""


def results() -> Iterator[Tensor]:
    torch.manual_seed(0)
    for k in (31, 32, 300):
        weight = torch.randn(70, k).bfloat16()
        for tokens in TOKENS:
            x = torch.randn(tokens, k).bfloat16()
            yield linear(x, weight)
            yield linear(x * 1e-38, weight)  # subnormal numbers, and products that are
    for tokens in TOKENS:
        x = torch.randn(tokens, 256).bfloat16()
        yield linear(x, torch.randn(70, 256).to(FP8), scale=torch.rand(1, 2))
        for stored in (INT4, INT8):
            for group in (32, 128):
                weight, scale = random_weight(70, 256, stored=stored, group=group, dtype=torch.bfloat16)
                yield linear(x, weight, scale=scale)
    for shape in SHAPES:
        for queries, length in ((1, 1), (1, 700), (3, 576), (40, 600)):
            yield from attend([random_tokens(shape, queries, length, torch.bfloat16)], shape)


if __name__ == "__main__":
    with force_backend("native"):
        torch.save(list(results()), sys.argv[1])
