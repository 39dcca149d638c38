"""`python -m tests.vllm.deterministic_on_triton CHECKPOINT`: answers on Triton in the deterministic mode, as JSON.

Of pairs of answers, those that have the same bits: with drafts and in pieces of few tokens, a request alone and beside
another, which cuts it elsewhere; and what was generated, generated again behind a longer prompt. The engine must run in
this very process (VLLM_ENABLE_V1_MULTIPROCESSING=0), where Triton's interpreter reaches it.
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

REQUEST, OTHER = Request(tuple(range(20, 29))), Request((7, 3))
MAX_TOKENS, KNOWN = 3, 2
OPTIONS = {"dtype": "bfloat16", "drafts": 2, "max_num_batched_tokens": 6, "max_num_seqs": 2}


def main(checkpoint: Path) -> None:
    triton = ",".join(f"{name}=triton" for name in operations_on_triton())
    with interpreted(*kernel_modules()), force_backend(triton), engine(checkpoint, **OPTIONS) as running:
        kernels = recorded_launches()
        (alone,) = running.answers([REQUEST], MAX_TOKENS)
        _, among = running.answers([OTHER, REQUEST], MAX_TOKENS)
        longer, rest = alone.behind(REQUEST, KNOWN)
        (prefilled,) = running.answers([longer], MAX_TOKENS - KNOWN)
        drafts = running.drafts()
    same = {"among": alone == among, "prefilled": rest == prefilled}
    print(json.dumps({"same": same, "drafts": (drafts.accepted, drafts.drafted), "kernels": sorted(kernels)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
