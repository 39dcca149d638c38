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
    assert reference.bfloat16_error_ratio(tiny_checkpoint, prompts[::3], plain[::3]) < 1.1


def test_drafts_change_no_token_on_two_ranks(tiny_checkpoint: Path) -> None:
    prompts = reference.prompts(tiny_checkpoint)[::2]
    plain, speculated = plain_and_speculated(tiny_checkpoint, prompts, tp_size=2)
    assert first_difference([tokens for tokens, _ in plain], speculated) is None
