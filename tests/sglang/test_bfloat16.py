"""bfloat16: as close to float32 as transformers' own, and drafts change no greedy token, on one rank and on two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import reference
from tests.reference import Tokens, first_difference
from tests.sglang.engines import engine

pytestmark = pytest.mark.sglang


def plain_and_speculated(
    checkpoint: Path, prompts: Sequence[Tokens], **options: Any
) -> tuple[list[tuple[Tokens, torch.Tensor]], list[Tokens]]:
    with engine(checkpoint, dtype="bfloat16", **options) as running:
        plain = running.greedy_with_log_probs(prompts)
    with engine(checkpoint, dtype="bfloat16", drafts=3, **options) as running:
        speculated = running.greedy(prompts)
    assert 0 < running.drafts.accepted < running.drafts.drafted
    return plain, speculated


def test_drafts_change_no_token_and_log_probs_are_as_close_as_those_of_transformers(tiny_checkpoint: Path) -> None:
    prompts = reference.prompts(tiny_checkpoint)
    plain, speculated = plain_and_speculated(tiny_checkpoint, prompts)
    assert first_difference([tokens for tokens, _ in plain], speculated) is None
    ours, theirs = [], []
    for prompt, (tokens, log_probs) in list(zip(prompts, plain, strict=True))[::3]:
        truth = reference.log_probs(tiny_checkpoint, prompt, tokens)
        ours.append((log_probs - truth).abs())
        theirs.append((reference.log_probs(tiny_checkpoint, prompt, tokens, torch.bfloat16) - truth).abs())
    error, allowed = torch.cat(ours).mean().item(), torch.cat(theirs).mean().item()
    print(f"mean |Δ log p| against float32: {error:.5f}, transformers in bfloat16 {allowed:.5f}")
    assert error < 1.1 * allowed


def test_drafts_change_no_token_on_two_ranks(tiny_checkpoint: Path) -> None:
    prompts = reference.prompts(tiny_checkpoint)[::2]
    plain, speculated = plain_and_speculated(tiny_checkpoint, prompts, tp_size=2)
    assert first_difference([tokens for tokens, _ in plain], speculated) is None
