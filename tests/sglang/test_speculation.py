"""NEXTN changes nothing: float32 greedy with drafts gives the tokens of transformers without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import reference
from tests.reference import first_difference
from tests.sglang.engines import Engine

pytestmark = pytest.mark.sglang


class Speculation:
    def test_tokens_equal_transformers_cold_and_warm(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.prompts(checkpoint)
        expected = [reference.greedy(checkpoint, prompt) for prompt in prompts]
        assert first_difference(expected, running.greedy(prompts)) is None
        assert first_difference(expected, running.greedy(prompts)) is None
        assert 0 < running.drafts.accepted < running.drafts.drafted, running.drafts

    def test_conversation_equals_transformers_and_is_continued_from_the_radix_cache(
        self, running: Engine, checkpoint: Path
    ) -> None:
        before = running.cached_tokens
        for prompt, answer in reference.turns(checkpoint, reference.prompts(checkpoint)[24], count=4):
            assert first_difference([answer], running.greedy([prompt])) is None
        assert running.cached_tokens > before


SMALL_BUDGET = {"chunked_prefill_size": 128, "max_running_requests": 6, "mamba_track_interval": 64}


@pytest.mark.parametrize(
    ("checkpoint", "running"),
    [
        ("random", {"drafts": 3} | SMALL_BUDGET),
        ("tiny", {"drafts": 1}),
        ("tiny", {"drafts": 2, "mamba_radix_cache_strategy": "no_buffer"}),
    ],
    ids=["random-3-small-budget", "tiny-1", "tiny-2-no_buffer"],
    indirect=True,
    scope="class",
)
class TestSpeculation(Speculation):
    pass


@pytest.mark.parametrize(("checkpoint", "running"), [("tiny", {"drafts": 3})], indirect=True, scope="class")
class TestTiny(Speculation):
    """One engine for all that is asked of the trained checkpoint with three drafts."""

    def test_log_probs_equal_transformers(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.prompts(checkpoint)[5:20]
        assert reference.largest_error(checkpoint, prompts, running.greedy_with_log_probs(prompts)) < 1e-3

    def test_three_drafts_give_two_tokens_a_step_on_held_out_passages(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.held_out_prompts(checkpoint)
        assert len(prompts) >= 20
        accepted, steps = running.drafts.accepted, running.drafts.steps
        running.greedy(prompts, max_tokens=128)
        length = 1 + (running.drafts.accepted - accepted) / (running.drafts.steps - steps)
        print(f"mean accepted length {length:.3f} at 3 draft tokens, {len(prompts)} held-out passages")
        assert length >= 2.0

    def test_sampled_tokens_are_as_likely_as_the_distribution_says(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.prompts(checkpoint)[5:20]
        sampled = running.sample(prompts, temperature=1.0, sampling_seed=3)
        assert abs(reference.likelihood_deviation(checkpoint, prompts, sampled)) < 4.5

    def test_top_k_of_one_is_greedy(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.prompts(checkpoint)[5:20]
        expected = [reference.greedy(checkpoint, prompt) for prompt in prompts]
        assert first_difference(expected, running.sample(prompts, temperature=1.0, top_k=1)) is None

    def test_tokens_outside_the_nucleus_are_never_drawn(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.prompts(checkpoint)[5:20]
        for prompt, tokens in zip(prompts, running.sample(prompts, temperature=1.0, top_p=0.6), strict=True):
            log_probs = reference.distributions(checkpoint, prompt, tokens)
            given = log_probs.gather(1, torch.tensor(tokens)[:, None])
            likelier = torch.where(log_probs > given + 1e-4, log_probs.exp(), 0.0).sum(dim=1)
            assert likelier.max() < 0.6 + 1e-3

    def test_weights_that_come_in_parts_are_served(self, running: Engine, checkpoint: Path) -> None:
        prompt, head = reference.prompts(checkpoint)[9], load_file(checkpoint / "model.safetensors")["lm_head.weight"]
        (before,) = running.greedy([prompt])
        try:
            running.update("lm_head.weight", head.roll(1, dims=0))
            assert running.greedy([prompt], max_tokens=1) == [((before[0] + 1) % head.shape[0],)]
        finally:
            running.update("lm_head.weight", head)
        assert running.greedy([prompt]) == [before]
