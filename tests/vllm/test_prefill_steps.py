"""With the prefix cache a prompt runs in one step, and leaves the state at its last block boundary to the next."""

from __future__ import annotations

import pytest

from tests import reference
from tests.checkpoints import TINY
from tests.vllm.engines import printed_by
from tests.vllm.prefill_steps import MAX_TOKENS, prompt_of

pytestmark = pytest.mark.vllm

BLOCK = 128
"""Tokens of a block of vLLM's cache on a CPU, where states are small."""
LENGTHS = (127, 128, 129, 200, 256, 257, 300, 384, 385, 700)


def boundary(length: int, drafts: int) -> int:
    """Up to where vLLM finds a prompt that it has seen: a block earlier with drafts, a token before the end without."""
    return max(length // BLOCK - 1, 0) * BLOCK if drafts else (length - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_prompt_runs_in_one_step_and_again_from_its_last_block_boundary(drafts: int) -> None:
    runs = printed_by("prefill_steps", str(TINY), str(drafts), ",".join(map(str, LENGTHS)))
    assert [(run["length"], run["cached"]) for run in runs] == [
        (n, cached) for n in LENGTHS for cached in (False, True)
    ]
    for run in runs:
        length = run["length"]
        known = boundary(length, drafts) if run["cached"] else 0
        prefill, *steps = run["steps"]
        assert prefill == [length - known], run
        assert max(map(sum, steps)) == 1 + drafts, run
        assert run["tokens"] == list(reference.greedy(TINY, prompt_of(length), MAX_TOKENS)), run
