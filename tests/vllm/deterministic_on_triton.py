"""`python -m tests.vllm.deterministic_on_triton CHECKPOINT`: answers on Triton in the deterministic mode, as JSON.

A request alone, without drafts and prefilled at once; and beside another, with drafts and in pieces of few tokens. The
engine must run in this very process (VLLM_ENABLE_V1_MULTIPROCESSING=0), where Triton's interpreter reaches it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from qnext_kernels import force_backend
from tests.determinism import Request
from tests.kernels.triton.interpreter import interpreted, kernel_modules, operations_on_triton
from tests.vllm.engines import engine
from tests.vllm.greedy_on_triton import recorded_launches

REQUEST, OTHER = Request(tuple(range(20, 33))), Request((7, 3, 11))
MAX_TOKENS = 4
PIECES = {"drafts": 2, "max_num_batched_tokens": 6, "max_num_seqs": 2}


def main(checkpoint: Path) -> None:
    triton = ",".join(f"{name}=triton" for name in operations_on_triton())
    with interpreted(*kernel_modules()), force_backend(triton):
        kernels = recorded_launches()
        with engine(checkpoint, dtype="bfloat16", max_num_seqs=2) as running:
            (alone,) = running.answers([REQUEST], MAX_TOKENS)
        with engine(checkpoint, dtype="bfloat16", **PIECES) as running:
            _, among = running.answers([OTHER, REQUEST], MAX_TOKENS)
            drafts = running.drafts()
    answers = {"alone": vars(alone), "among": vars(among)}
    print(json.dumps(answers | {"drafts": (drafts.accepted, drafts.drafted), "kernels": sorted(kernels)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
