"""Speculation changes nothing: float32 greedy with MTP gives the tokens of transformers without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import reference
from tests.reference import first_difference
from tests.vllm.engines import Engine

pytestmark = pytest.mark.vllm


def assert_partly_rejected(running: Engine) -> None:
    drafts = running.drafts()
    assert 0 < drafts.accepted < drafts.drafted, drafts


class Speculation:
    def test_tokens_equal_transformers_cold_and_warm(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.prompts(checkpoint)
        expected = [reference.greedy(checkpoint, prompt) for prompt in prompts]
        assert first_difference(expected, running.greedy(prompts)) is None
        before = running.prefix_cache_hits()
        assert first_difference(expected, running.greedy(prompts)) is None
        assert running.prefix_cache_hits() > before
        assert_partly_rejected(running)

    def test_conversation_equals_transformers(self, running: Engine, checkpoint: Path) -> None:
        for start in (reference.prompts(checkpoint)[12], reference.prompts(checkpoint)[24]):
            for prompt, answer in reference.turns(checkpoint, start, count=4):
                assert first_difference([answer], running.greedy([prompt])) is None


@pytest.mark.parametrize(
    ("checkpoint", "running"),
    [("tiny", {"drafts": 1}), ("tiny", {"drafts": 3}), ("random", {"drafts": 2})],
    indirect=True,
    scope="class",
)
class TestSpeculation(Speculation):
    pass


@pytest.mark.parametrize(("checkpoint", "running"), [("tiny", {"drafts": 2})], indirect=True, scope="class")
class TestTiny(Speculation):
    """One engine for all that is asked of the trained checkpoint with two drafts."""

    def test_two_drafts_give_two_tokens_a_step_on_held_out_passages(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.held_out_prompts(checkpoint)
        assert len(prompts) >= 20
        before = running.drafts()
        running.greedy(prompts, max_tokens=128)
        after = running.drafts()
        length = 1 + (after.accepted - before.accepted) / (after.steps - before.steps)
        print(f"mean accepted length {length:.3f} at 2 draft tokens, {len(prompts)} held-out passages")
        assert length >= 2.0

    def test_sampled_tokens_are_as_likely_as_the_distribution_says(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.prompts(checkpoint)[5:20]
        sampled = running.sample(prompts, temperature=1.0, seed=3)
        assert abs(reference.likelihood_deviation(checkpoint, prompts, sampled)) < 4.5

    def test_top_k_of_one_is_greedy(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.prompts(checkpoint)[5:20]
        expected = [reference.greedy(checkpoint, prompt) for prompt in prompts]
        assert first_difference(expected, running.sample(prompts, temperature=1.0, top_k=1)) is None

    def test_a_seed_gives_the_same_tokens_again(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.prompts(checkpoint)[5:9]
        options = {"temperature": 1.0, "top_p": 0.9, "seed": 11}
        assert running.sample(prompts, **options) == running.sample(prompts, **options)
        assert running.sample(prompts, **options) != running.sample(prompts, **options | {"seed": 12})


SMALL_BUDGET = {"drafts": 3, "max_num_batched_tokens": 160, "max_num_seqs": 6}


@pytest.mark.parametrize(
    ("checkpoint", "running"), [("tiny", SMALL_BUDGET), ("random", SMALL_BUDGET)], indirect=True, scope="class"
)
class TestMixedBatches:
    """A small token budget: prompts are prefilled in pieces beside sequences that decode and speculate."""

    def test_chunked_prefill_and_continuous_batching_equal_transformers(
        self, running: Engine, checkpoint: Path
    ) -> None:
        prompts = reference.prompts(checkpoint)
        order = sorted(range(len(prompts)), key=lambda n: (n * 7) % len(prompts))
        expected = [reference.greedy(checkpoint, prompts[n]) for n in order]
        assert first_difference(expected, running.greedy([prompts[n] for n in order])) is None
        assert_partly_rejected(running)
