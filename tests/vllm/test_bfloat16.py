"""bfloat16 with vLLM's default flags: no further from float32 transformers than transformers' own bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import reference
from tests.vllm.engines import engine

pytestmark = pytest.mark.vllm

LARGEST_RATIO = 1.1


def test_log_probs_with_drafts_are_as_close_to_float32_as_those_of_transformers(tiny_checkpoint: Path) -> None:
    prompts = reference.prompts(tiny_checkpoint)
    with engine(tiny_checkpoint, dtype="bfloat16", drafts=2, eager=False) as running:
        results = running.greedy_with_log_probs(prompts)
    ours, theirs = [], []
    for prompt, (tokens, given) in zip(prompts, results, strict=True):
        truth = reference.log_probs(tiny_checkpoint, prompt, tokens)
        ours.append((given - truth).abs())
        theirs.append((reference.log_probs(tiny_checkpoint, prompt, tokens, torch.bfloat16) - truth).abs())
    mean_ours, mean_theirs = torch.cat(ours).mean(), torch.cat(theirs).mean()
    print(f"mean |Δ log p| against float32: ours {mean_ours:.5f}, transformers' bfloat16 {mean_theirs:.5f}")
    assert mean_ours <= LARGEST_RATIO * mean_theirs
