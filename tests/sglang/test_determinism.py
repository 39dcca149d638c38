"""The deterministic mode: a request's tokens and log-probabilities have the same bits however it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import reference
from tests.determinism import Requests, alone, among
from tests.sglang.engines import engine

pytestmark = pytest.mark.sglang

SMALL_BUDGET = {"drafts": 3, "chunked_prefill_size": 128, "max_running_requests": 6, "mamba_track_interval": 64}


@pytest.mark.parametrize(
    ("checkpoint", "dtype", "asked"),
    [("random", "float32", {}), ("tiny", "bfloat16", {"enable_deterministic_inference": True})],
    indirect=["checkpoint"],
)
def test_an_answer_is_the_same_alone_among_others_cached_in_pieces_speculated_and_on_more_threads(
    checkpoint: Path, dtype: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = Requests.of(reference.prompts(checkpoint))
    if not asked:
        monkeypatch.setenv("QNEXT_DETERMINISTIC", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with engine(checkpoint, dtype=dtype, **asked) as running:
        expected, seeded = alone(running, requests.greedy), alone(running, requests.seeded)
        before = running.cached_tokens
        assert alone(running, requests.greedy) == expected
        assert running.cached_tokens > before
        assert among(running, requests.greedy, requests.others) == expected
        assert among(running, requests.seeded, requests.others) == seeded
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with engine(checkpoint, dtype=dtype, **asked, **SMALL_BUDGET) as running:
        assert among(running, requests.greedy, requests.others) == expected
        assert alone(running, requests.greedy) == expected
    assert 0 < running.drafts.accepted < running.drafts.drafted
