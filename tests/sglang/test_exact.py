"""Float32: the tokens of transformers, alone and batched, cold and from the radix cache, prefilled in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest

from qnext_sglang.cpu.defaults import PAGE_SIZE
from tests import reference
from tests.reference import first_difference
from tests.sglang.engines import Engine

pytestmark = pytest.mark.sglang

LOG_PROB_TOLERANCE = 1e-3


@pytest.mark.parametrize("checkpoint", ["tiny", "random"], indirect=True, scope="class")
class TestDefaults:
    """The radix cache keeps snapshots (``extra_buffer``), scheduling overlaps, and the cache is in pages."""

    def test_the_cache_is_in_pages(self, running: Engine) -> None:
        assert running.engine.get_server_info()["page_size"] == PAGE_SIZE

    def test_tokens_and_log_probs_equal_transformers_batched(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.prompts(checkpoint)
        assert len(prompts) >= 30
        results = running.greedy_with_log_probs(prompts)
        expected = [reference.greedy(checkpoint, prompt) for prompt in prompts]
        assert first_difference(expected, [tokens for tokens, _ in results]) is None
        assert reference.largest_error(checkpoint, prompts, results) < LOG_PROB_TOLERANCE

    def test_tokens_equal_transformers_alone_and_from_the_radix_cache(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.prompts(checkpoint)[::2]
        before = running.cached_tokens
        alone = [running.greedy([prompt])[0] for prompt in prompts]
        assert running.cached_tokens > before, "the long prompts were served before: they are cached"
        assert first_difference([reference.greedy(checkpoint, prompt) for prompt in prompts], alone) is None


@pytest.mark.parametrize(
    ("checkpoint", "running"),
    [
        ("tiny", {"mamba_radix_cache_strategy": "no_buffer", "chunked_prefill_size": 64}),
        ("tiny", {"chunked_prefill_size": 128, "max_running_requests": 6, "mamba_track_interval": 64, "page_size": 16}),
    ],
    ids=["no_buffer", "extra_buffer"],
    indirect=True,
    scope="class",
)
class TestSmallBudget:
    """Prompts are prefilled in pieces; the cache is asked for prefixes that were left behind in the middle of one."""

    def test_chunked_prefill_equals_transformers_cold_and_warm(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.prompts(checkpoint)
        expected = [reference.greedy(checkpoint, prompt) for prompt in prompts]
        assert first_difference(expected, running.greedy(prompts)) is None
        assert first_difference(expected, running.greedy(prompts)) is None

    def test_conversation_equals_transformers(self, running: Engine, checkpoint: Path) -> None:
        before = running.cached_tokens
        for prompt, answer in reference.turns(checkpoint, reference.prompts(checkpoint)[28], count=4):
            assert first_difference([answer], running.greedy([prompt])) is None
        assert running.cached_tokens > before


@pytest.mark.parametrize(
    ("checkpoint", "running"),
    [("tiny", {"max_total_tokens": 1024, "max_running_requests": 12})],
    ids=["16-pages"],
    indirect=True,
    scope="class",
)
class TestSmallPool:
    def test_requests_that_have_to_give_way_equal_transformers(self, running: Engine, checkpoint: Path) -> None:
        prompts = reference.prompts(checkpoint)
        assert sum(map(len, prompts)) > 3 * 1024
        expected = [reference.greedy(checkpoint, prompt) for prompt in prompts]
        assert first_difference(expected, running.greedy(prompts)) is None

    def test_a_prompt_that_leaves_no_page_is_refused_and_others_are_served(
        self, running: Engine, checkpoint: Path
    ) -> None:
        prompt = reference.prompts(checkpoint)[28]
        with pytest.raises(ValueError, match="exceeds the KV memory budget"):
            running.greedy([(prompt * 1024)[: 1024 - PAGE_SIZE]])
        assert first_difference([reference.greedy(checkpoint, prompt)], running.greedy([prompt])) is None
