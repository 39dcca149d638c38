"""Two ranks give the tokens of one, with and without speculation, with vLLM's flag alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import reference
from tests.reference import first_difference
from tests.vllm.engines import engine
from tests.vllm.test_speculation import assert_partly_rejected

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("checkpoint", "drafts"),
    [("tiny", 2), ("random", 0)],
    indirect=["checkpoint"],
)
def test_two_ranks_equal_transformers_cold_warm_and_in_conversation(checkpoint: Path, drafts: int) -> None:
    prompts = reference.prompts(checkpoint)
    expected = [reference.greedy(checkpoint, prompt) for prompt in prompts]
    with engine(checkpoint, drafts=drafts, tensor_parallel_size=2) as running:
        assert first_difference(expected, running.greedy(prompts)) is None
        assert first_difference(expected, running.greedy(prompts)) is None
        for prompt, answer in reference.turns(checkpoint, prompts[12], count=3):
            assert first_difference([answer], running.greedy([prompt])) is None
        if drafts:
            assert_partly_rejected(running)
