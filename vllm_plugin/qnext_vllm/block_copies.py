"""Has vLLM copy all of a cache block of which a prompt needs a part.

With ``--prefix-match-unit`` a known prefix may end inside a block, which is then copied. Layers of several kinds keep
theirs in the same memory, and vLLM copies each place once: what the first layer's view of it holds. That may be a
recurrent state, and less than another layer's keys and values, whose last tokens were left behind.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from torch import Tensor

RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
"""Who copies; the first is that of CPUs too."""


@cache
def copy_whole_blocks() -> None:
    """Have the largest view of each place come first, in the model runners that this process has loaded."""
    from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace as original

    def copy(kv_caches: Iterable[Tensor], num_blocks: int, kv_cache_block_copies: Sequence[Any]) -> None:
        largest_first = sorted(kv_caches, key=lambda cache: cache.nbytes, reverse=True)
        original(largest_first, num_blocks, kv_cache_block_copies)

    for name in RUNNERS:
        if (runner := sys.modules.get(name)) is not None:
            runner.copy_kv_cache_blocks_inplace = copy  # type: ignore[attr-defined]
