"""Float32: the tokens of transformers, alone and batched, cold and from the prefix cache, compiled or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import reference
from tests.checkpoints import TINY
from tests.reference import first_difference
from tests.vllm.engines import Engine, printed_by

pytestmark = pytest.mark.vllm

LOG_PROB_TOLERANCE = 1e-3


@pytest.mark.parametrize("checkpoint", ["tiny", "random"], indirect=True, scope="class")
class TestEager:
    def test_tokens_and_log_probs_equal_transformers_batched(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.prompts(checkpoint)
        assert len(prompts) >= 30
        results = running.greedy_with_log_probs(prompts)
        expected = [reference.greedy(checkpoint, prompt) for prompt in prompts]
        assert first_difference(expected, [tokens for tokens, _ in results]) is None
        assert reference.largest_error(checkpoint, prompts, results) < LOG_PROB_TOLERANCE

    def test_tokens_equal_transformers_alone_and_from_the_prefix_cache(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.prompts(checkpoint)[::2]
        before = running.prefix_cache_hits()
        alone = [running.greedy([prompt])[0] for prompt in prompts]
        assert running.prefix_cache_hits() > before, "prompts of several blocks were batched before: they are cached"
        assert first_difference([reference.greedy(checkpoint, prompt) for prompt in prompts], alone) is None

    def test_tokens_equal_transformers_after_the_weights_are_loaded_again(
        self, running: Engine, checkpoint: Path
    ) -> None:
        prompts = reference.prompts(checkpoint)[::4]
        running.llm.collective_rpc("reload_weights")
        assert running.llm.reset_prefix_cache()
        expected = [reference.greedy(checkpoint, prompt) for prompt in prompts]
        assert first_difference(expected, running.greedy(prompts)) is None


@pytest.mark.parametrize(("checkpoint", "running"), [("tiny", {"eager": False})], indirect=True, scope="class")
class TestCompiled:
    def test_tokens_equal_transformers(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.prompts(checkpoint)
        expected = [reference.greedy(checkpoint, prompt) for prompt in prompts]
        assert first_difference(expected, running.greedy(prompts)) is None


class TestPutTogetherAsOnGpus:
    def test_tokens_equal_transformers_before_and_after_the_weights_are_loaded_again(self) -> None:
        printed = printed_by("greedy_as_on_gpus", str(TINY), "2")
        prompts = reference.prompts(TINY)[::2]
        expected = [reference.greedy(TINY, prompt) for prompt in prompts]
        for answers in printed["answers"]:
            assert first_difference(expected, [tuple(tokens) for tokens in answers]) is None
        layer = "model.layers.0.linear_attn"
        assert f"{layer}.in_proj_qkvzba.weight" in printed["parameters"]
        assert f"{layer}.in_proj_ba.weight" not in printed["parameters"]
