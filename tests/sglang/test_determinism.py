"""The deterministic mode: a request's tokens and log-probabilities have the same bits however it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from qnext_kernels.dispatch import deterministic
from qnext_sglang.determinism import DeterminismError, obstacles, prepare
from tests import reference
from tests.determinism import Requests, alone, among
from tests.sglang.engines import engine

SMALL_BUDGET = {"drafts": 3, "chunked_prefill_size": 128, "max_running_requests": 6, "mamba_track_interval": 64}


@pytest.mark.sglang
@pytest.mark.parametrize(
    ("checkpoint", "dtype", "asked"),
    [("random", "float32", {}), ("tiny", "bfloat16", {"enable_deterministic_inference": True})],
    indirect=["checkpoint"],
)
def test_an_answer_is_the_same_alone_among_others_cached_in_pieces_speculated_and_on_more_threads(
    checkpoint: Path,
    dtype: str,
    asked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    requests = Requests.of(reference.prompts(checkpoint))
    if not asked:
        monkeypatch.setenv("QNEXT_DETERMINISTIC", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with engine(checkpoint, dtype=dtype, log_level="info", **asked) as running:
        expected, seeded = alone(running, requests.greedy), alone(running, requests.seeded)
        before = running.cached_tokens
        assert alone(running, requests.greedy[-2:]) == expected[-2:]
        assert running.cached_tokens > before
        assert among(running, requests.greedy, requests.others) == expected
        assert among(running, requests.seeded, requests.others) == seeded
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with engine(checkpoint, dtype=dtype, **asked, **SMALL_BUDGET) as running:
        assert among(running, requests.greedy, requests.others) == expected
        assert alone(running, requests.greedy[-2:]) == expected[-2:]
    assert 0 < running.drafts.accepted < running.drafts.drafted
    # Not with a dense layer, which the random checkpoint has; where they are, steps with prefills run them one by one.
    assert ("decoder layers are one call" in "".join(capfd.readouterr())) == (dtype == "bfloat16")


def test_what_runs_on_sglangs_own_operators_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not obstacles(ServerArgs(model_path="checkpoint"), None, None)
    monkeypatch.setenv("SGLANG_MAMBA_SSM_DTYPE", "bfloat16")
    server_args = ServerArgs(model_path="checkpoint", kv_cache_dtype="fp8_e5m2", enable_fp32_lm_head=True)
    prepare(server_args, None, object())
    with deterministic(), pytest.raises(DeterminismError) as raised:
        prepare(server_args, None, object())
    assert str(raised.value) == (
        "qnext-plugins: the deterministic mode does not serve quantized weights, --enable-fp32-lm-head, "
        "--kv-cache-dtype fp8_e5m2, --mamba-ssm-dtype torch.bfloat16"
    )
