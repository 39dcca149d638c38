"""Two ranks give the tokens of one, with and without speculation, with vLLM's flag alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import reference
from tests.vllm.engines import engine, first_difference

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("checkpoint", ["tiny", "random"], indirect=True)
def test_two_ranks_equal_transformers(checkpoint: Path, drafts: int) -> None:
    prompts = reference.prompts(checkpoint)
    expected = [reference.greedy(checkpoint, prompt) for prompt in prompts]
    with engine(checkpoint, drafts=drafts, tensor_parallel_size=2) as running:
        assert first_difference(expected, running.greedy(prompts)) is None
        assert first_difference(expected, running.greedy(prompts)) is None
        if drafts:
            counters = running.drafts()
            assert 0 < counters.accepted < counters.drafted
