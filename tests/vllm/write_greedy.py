"""`python -m tests.vllm.write_greedy CHECKPOINT FILE`: vLLM's greedy tokens and their log-probabilities, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests import reference
from tests.vllm.engines import engine


def main(checkpoint: Path, file: Path) -> None:
    with engine(checkpoint) as running:
        results = running.greedy_with_log_probs(reference.prompts(checkpoint))
    file.write_text(json.dumps([[list(tokens), log_probs.tolist()] for tokens, log_probs in results]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
