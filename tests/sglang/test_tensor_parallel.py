"""Two ranks, float32: the tokens of transformers, with drafts and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import reference
from tests.reference import first_difference
from tests.sglang.engines import engine

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize(
    ("checkpoint", "drafts", "options"),
    [
        ("random", 0, {}),
        ("tiny", 3, {}),
        # What SGLang chooses by itself on Hopper and Blackwell: norms sum. Here they do without FlashInfer's kernel.
        ("tiny", 3, {"flashinfer_allreduce_fusion_backend": "auto"}),
    ],
    indirect=["checkpoint"],
)
def test_two_ranks_equal_transformers(checkpoint: Path, drafts: int, options: dict[str, Any]) -> None:
    prompts = reference.prompts(checkpoint)[::2]
    expected = [reference.greedy(checkpoint, prompt) for prompt in prompts]
    with engine(checkpoint, drafts=drafts, tp_size=2, **options) as running:
        assert first_difference(expected, running.greedy(prompts)) is None
        assert first_difference(expected, running.greedy(prompts)) is None
        assert running.cached_tokens > 0
    if drafts:
        assert 0 < running.drafts.accepted < running.drafts.drafted
