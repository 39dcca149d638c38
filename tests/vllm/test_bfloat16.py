"""bfloat16 with vLLM's default flags: no further from float32 transformers than transformers' own bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import reference
from tests.vllm.engines import engine

pytestmark = pytest.mark.vllm

LARGEST_RATIO = 1.1


def test_log_probs_with_drafts_are_as_close_to_float32_as_those_of_transformers(tiny_checkpoint: Path) -> None:
    prompts = reference.prompts(tiny_checkpoint)
    with engine(tiny_checkpoint, dtype="bfloat16", drafts=2, eager=False) as running:
        results = running.greedy_with_log_probs(prompts)
    assert reference.bfloat16_error_ratio(tiny_checkpoint, prompts, results) <= LARGEST_RATIO
