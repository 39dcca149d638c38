"""The deterministic mode: a request's tokens and log-probabilities have the same bits however it is served."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from vllm import EngineArgs
from vllm.v1.sample.sampler import Sampler

from qnext_kernels.dispatch import deterministic
from qnext_vllm import determinism
from qnext_vllm.determinism import DeterminismError, obstacles, prepare
from tests import reference
from tests.determinism import Requests, alone, among
from tests.vllm.engines import engine

SMALL_BUDGET = {"drafts": 3, "max_num_batched_tokens": 160, "max_num_seqs": 6}


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("checkpoint", "dtype", "variable"),
    [("random", "float32", "QNEXT_DETERMINISTIC"), ("tiny", "bfloat16", "VLLM_BATCH_INVARIANT")],
    indirect=["checkpoint"],
)
def test_an_answer_is_the_same_alone_among_others_cached_in_pieces_speculated_and_on_more_threads(
    checkpoint: Path,
    dtype: str,
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    requests = Requests.of(reference.prompts(checkpoint))
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))[:2]]
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", cores[0])
    with engine(checkpoint, dtype=dtype) as running:
        expected, seeded = alone(running, requests.greedy), alone(running, requests.seeded)
        before = running.prefix_cache_hits()
        assert alone(running, requests.greedy[-2:]) == expected[-2:]
        assert running.prefix_cache_hits() > before
        assert among(running, requests.greedy, requests.others) == expected
        assert among(running, requests.seeded, requests.others) == seeded
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", ",".join(cores))
    with engine(checkpoint, dtype=dtype, **SMALL_BUDGET) as running:
        assert among(running, requests.greedy, requests.others) == expected
        assert alone(running, requests.greedy[-2:]) == expected[-2:]
        drafts = running.drafts()
    assert 0 < drafts.accepted < drafts.drafted
    # Not with a dense layer, which the random checkpoint has; where they are, steps with prefills run them one by one.
    assert ("decoder layers are one call" in "".join(capfd.readouterr())) == (dtype == "bfloat16")


def test_what_runs_on_vllms_own_operators_is_refused_by_name(tiny_checkpoint: Path) -> None:
    served = EngineArgs(model=str(tiny_checkpoint), dtype="bfloat16").create_engine_config()
    assert not obstacles(served)
    config = EngineArgs(
        model=str(tiny_checkpoint),
        dtype="bfloat16",
        enable_lora=True,
        mamba_ssm_cache_dtype="bfloat16",
        hf_overrides={"head_dtype": "float32"},
    ).create_engine_config()
    prepare(config)
    with deterministic(), pytest.raises(DeterminismError) as raised:
        prepare(config)
    assert str(raised.value) == (
        "qnext-plugins: the deterministic mode does not serve a head in torch.float32 beside torch.bfloat16, "
        "LoRA adapters, --mamba-ssm-cache-dtype torch.bfloat16"
    )


def test_top_log_probs_without_ties_are_those_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    log_probs = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).log_softmax(dim=1)
    tokens = torch.tensor([3, 0, 299, 17, 18])
    expected = Sampler.gather_logprobs(log_probs, 7, tokens)
    monkeypatch.setattr(Sampler, "gather_logprobs", Sampler.gather_logprobs)
    determinism.order_top_log_probs.__wrapped__()
    found = Sampler.gather_logprobs(log_probs, 7, tokens)
    for name in ("logprob_token_ids", "logprobs", "selected_token_ranks"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype
