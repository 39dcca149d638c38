"""bfloat16: as close to float32 as transformers' own, and drafts change no greedy token, on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import reference
from tests.reference import first_difference
from tests.sglang.engines import engine

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize("ranks", [1, 2])
def test_drafts_change_no_token_and_log_probs_are_as_close_as_those_of_transformers(
    ranks: int, tiny_checkpoint: Path
) -> None:
    prompts = reference.prompts(tiny_checkpoint)
    with engine(tiny_checkpoint, dtype="bfloat16", tp_size=ranks) as running:
        plain = running.greedy_with_log_probs(prompts)
    with engine(tiny_checkpoint, dtype="bfloat16", tp_size=ranks, drafts=3) as running:
        speculated = running.greedy(prompts)
        again = running.greedy(prompts)
    assert 0 < running.drafts.accepted < running.drafts.drafted
    expected = [tokens for tokens, _ in plain]
    assert first_difference(expected, speculated) is None
    assert first_difference(expected, again) is None

    ours, theirs = [], []
    for prompt, (tokens, log_probs) in list(zip(prompts, plain, strict=True))[::3]:
        truth = reference.log_probs(tiny_checkpoint, prompt, tokens)
        ours.append((log_probs - truth).abs())
        theirs.append((reference.log_probs(tiny_checkpoint, prompt, tokens, torch.bfloat16) - truth).abs())
    error, allowed = torch.cat(ours).mean().item(), torch.cat(theirs).mean().item()
    print(f"mean |Δ log p| against float32: {error:.5f}, transformers in bfloat16 {allowed:.5f}")
    assert error < 1.5 * allowed
