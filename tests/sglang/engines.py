"""Starts real SGLang engines and asks them for tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sglang
import torch

from tests.determinism import Answer, Request
from tests.reference import MAX_TOKENS, Tokens


@dataclass
class Drafts:
    """Speculation counters of an engine."""

    drafted: int = 0
    accepted: int = 0
    steps: int = 0


@dataclass
class Engine:
    """A running engine."""

    engine: sglang.Engine
    drafts: Drafts = field(default_factory=Drafts)
    """Since the engine started."""
    cached_tokens: int = 0
    """Prompt tokens taken from the radix cache since the engine started."""

    def greedy(self, prompts: Sequence[Tokens], max_tokens: int = MAX_TOKENS) -> list[Tokens]:
        """Greedy continuations of all prompts at once, end of sequence ignored."""
        return self.sample(prompts, max_tokens, temperature=0.0)

    def sample(self, prompts: Sequence[Tokens], max_tokens: int = MAX_TOKENS, **options: Any) -> list[Tokens]:
        """Continuations of all prompts at once; ``options`` are SGLang's sampling parameters."""
        return [tuple(result["output_ids"]) for result in self._generate(prompts, max_tokens, options)]

    def greedy_with_log_probs(
        self, prompts: Sequence[Tokens], max_tokens: int = MAX_TOKENS
    ) -> list[tuple[Tokens, torch.Tensor]]:
        """Greedy continuations and the log-probability [max_tokens] that the engine gave each token."""
        results = self._generate(prompts, max_tokens, {"temperature": 0.0}, return_logprob=True)
        return [
            (
                tuple(result["output_ids"]),
                torch.tensor([given for given, _, _ in result["meta_info"]["output_token_logprobs"]]),
            )
            for result in results
        ]

    def answers(self, requests: Sequence[Request], max_tokens: int) -> list[Answer]:
        """Answers to all requests at once, end of sequence ignored."""
        options = [dict(request.parameters) for request in requests]
        for parameters in options:
            if (seed := parameters.pop("seed", None)) is not None:
                parameters["sampling_seed"] = seed
        prompts, top = [request.prompt for request in requests], [request.top for request in requests]
        results = self._generate(prompts, max_tokens, options, return_logprob=True, top_logprobs_num=top)
        answers = []
        for result, count in zip(results, top, strict=True):
            meta = result["meta_info"]
            given = tuple(log_prob for log_prob, _, _ in meta["output_token_logprobs"])
            entries = meta["output_top_logprobs"] if count else [[]] * len(given)
            pairs = tuple(tuple((token, log_prob) for log_prob, token, _ in entry) for entry in entries)
            answers.append(Answer(tuple(result["output_ids"]), given, pairs))
        return answers

    def update(self, name: str, weight: torch.Tensor) -> None:
        """Replace one tensor of the checkpoint, as a trainer does between its steps."""
        self.engine.begin_weight_update()
        updated = self.engine.update_weights_from_tensor([(name, weight)])
        for success, message in (updated, self.engine.end_weight_update()):
            assert success, message

    def _generate(
        self,
        prompts: Sequence[Tokens],
        max_tokens: int,
        options: dict[str, Any] | Sequence[dict[str, Any]],
        **request: Any,
    ) -> list[dict[str, Any]]:
        common, ids = {"max_new_tokens": max_tokens, "ignore_eos": True}, [list(prompt) for prompt in prompts]
        parameters = common | options if isinstance(options, dict) else [common | own for own in options]
        results = self.engine.generate(input_ids=ids, sampling_params=parameters, **request)
        for meta in (result["meta_info"] for result in results):
            self.cached_tokens += meta["cached_tokens"]
            if "spec_verify_ct" in meta:
                self.drafts.steps += meta["spec_verify_ct"]
                self.drafts.drafted += meta["spec_num_proposed_drafts"]
                self.drafts.accepted += meta["spec_num_correct_drafts"]
        return results


@contextmanager
def engine(
    checkpoint: Path,
    *,
    dtype: str = "float32",
    drafts: int = 0,
    engine_class: type[sglang.Engine] = sglang.Engine,
    **options: Any,
) -> Iterator[Engine]:
    """Start ``sglang.Engine`` on a checkpoint; everything not named here is the plugin's or SGLang's default."""
    if drafts:
        options |= {
            "speculative_algorithm": "NEXTN",
            "speculative_num_steps": drafts,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": drafts + 1,
        }
    running = engine_class(model_path=str(checkpoint), dtype=dtype, context_length=1024, **options)
    try:
        yield Engine(running)
    finally:
        running.shutdown()
