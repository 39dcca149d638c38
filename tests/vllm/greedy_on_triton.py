"""`python -m tests.vllm.greedy_on_triton CHECKPOINT DRAFTS DTYPE`: greedy tokens, on Triton and without, as JSON.

The engine must run in this very process (VLLM_ENABLE_V1_MULTIPROCESSING=0), where Triton's interpreter reaches it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from triton.runtime.interpreter import GridExecutor
from vllm.model_executor.layers.quantization import fp8

from qnext_kernels import force_backend
from tests.kernels.triton.interpreter import interpreted, kernel_modules, operations_on_triton
from tests.vllm.engines import engine

PROMPTS = ((7, 3, 11), tuple(range(20, 86)))
"""Less than a chunk of the delta rule, and more."""
MAX_TOKENS = 5


def recorded_launches() -> set[str]:
    """The names of the kernels that the interpreter runs from now on."""
    names: set[str] = set()
    run = GridExecutor.__call__

    def call(self: Any, *args: Any, **options: Any) -> None:
        names.add(self.fn.__name__)
        run(self, *args, **options)

    GridExecutor.__call__ = call
    return names


def without_linears_in_fp8() -> None:
    """Let linears in FP8 be made, for which vLLM has no kernel on this CPU; here ours alone read their weights."""
    fp8.init_fp8_linear_kernel = lambda **options: None


def main(checkpoint: Path, drafts: int, dtype: str) -> None:
    without_linears_in_fp8()
    triton = ",".join(f"{name}=triton" for name in operations_on_triton())
    options = {"drafts": drafts, "dtype": dtype, "max_num_batched_tokens": 72, "max_num_seqs": 2}
    with interpreted(*kernel_modules()), force_backend(triton), engine(checkpoint, **options) as running:
        launched = recorded_launches()
        interpreted_tokens = running.greedy(PROMPTS, MAX_TOKENS)
        kernels = sorted(launched)
        running.llm.reset_prefix_cache()
        with force_backend(triton.replace("=triton", "=native")):
            native_tokens = running.greedy(PROMPTS, MAX_TOKENS)
        drafts_seen = (running.drafts().accepted, running.drafts().drafted) if drafts else (0, 0)
    assert kernels == sorted(launched), "the second run was not without Triton"
    answer = {"triton": interpreted_tokens, "native": native_tokens, "drafts": drafts_seen, "kernels": kernels}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
