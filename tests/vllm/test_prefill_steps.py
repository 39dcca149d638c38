"""With the prefix cache a prompt runs in one step, and leaves the state at its last block boundary to the next."""

from __future__ import annotations

import json

import pytest

from tests import reference
from tests.checkpoints import TINY
from tests.vllm.engines import printed_by
from tests.vllm.prefill_steps import MAX_TOKENS, prompt_of

pytestmark = pytest.mark.vllm

BLOCK = 128
"""Tokens of a block of vLLM's cache on a CPU, where states are small."""
LENGTHS = (63, 127, 128, 129, 130, 200, 256, 257, 300, 384, 385, 700)


def boundary(length: int, unit: int, drafts: int) -> int:
    """Up to where vLLM at least finds a prompt that it has seen: a token before the end, with drafts a unit earlier."""
    return max(length // unit - 1, 0) * unit if drafts else (length - 1) // unit * unit


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("unit", [BLOCK, 64])
def test_a_prompt_runs_in_one_step_and_again_from_its_last_boundary(unit: int, drafts: int) -> None:
    options = {"drafts": drafts} | ({} if unit == BLOCK else {"prefix_match_unit": unit})
    runs = printed_by("prefill_steps", str(TINY), json.dumps(LENGTHS), json.dumps(options))
    assert [(run["length"], run["cached"]) for run in runs] == [
        (length, cached) for length in LENGTHS for cached in (False, True)
    ]
    for run in runs:
        length, steps = run["length"], [sum(step) for step in run["steps"]]
        if run["cached"]:
            assert steps[0] <= length - boundary(length, unit, drafts), run
        else:
            # A state that lies within the first block takes a step of its own: there is no block in front for it.
            assert steps[0] == length or (unit < length <= BLOCK and steps[0] + steps[1] == length), run
        assert run["tokens"] == list(reference.greedy(TINY, prompt_of(length), MAX_TOKENS)), run
