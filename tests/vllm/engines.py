"""Starts real vLLM engines and asks them for tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams, TokensPrompt

from tests.determinism import Answer, Request
from tests.reference import MAX_TOKENS, Tokens


@dataclass
class Drafts:
    """Speculation counters of an engine."""

    drafted: int
    accepted: int
    steps: int


@dataclass
class Engine:
    """A running engine."""

    llm: LLM

    def greedy(self, prompts: Sequence[Tokens], max_tokens: int = MAX_TOKENS) -> list[Tokens]:
        """Greedy continuations of all prompts at once, end of sequence ignored."""
        return self.sample(prompts, max_tokens, temperature=0.0)

    def sample(self, prompts: Sequence[Tokens], max_tokens: int = MAX_TOKENS, **options: Any) -> list[Tokens]:
        """Continuations of all prompts at once; ``options`` are vLLM's sampling parameters."""
        return [tuple(completion.token_ids) for completion in self._complete(prompts, max_tokens, **options)]

    def greedy_with_log_probs(
        self, prompts: Sequence[Tokens], max_tokens: int = MAX_TOKENS
    ) -> list[tuple[Tokens, torch.Tensor]]:
        """Greedy continuations and the log-probability [max_tokens] that the engine gave each token."""
        results = []
        for completion in self._complete(prompts, max_tokens, temperature=0.0, logprobs=0):
            tokens = tuple(completion.token_ids)
            given = [entry[token].logprob for token, entry in zip(tokens, completion.logprobs, strict=True)]
            results.append((tokens, torch.tensor(given)))
        return results

    def _complete(self, prompts: Sequence[Tokens], max_tokens: int, **options: Any) -> list[Any]:
        parameters = SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False, **options)
        inputs = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        return [output.outputs[0] for output in self.llm.generate(inputs, parameters, use_tqdm=False)]

    def answers(self, requests: Sequence[Request], max_tokens: int) -> list[Answer]:
        """Answers to all requests at once, end of sequence ignored."""
        inputs = [TokensPrompt(prompt_token_ids=list(request.prompt)) for request in requests]
        common = {"max_tokens": max_tokens, "ignore_eos": True, "detokenize": False}
        parameters = [SamplingParams(logprobs=request.top, **request.parameters, **common) for request in requests]
        answers = []
        for output in self.llm.generate(inputs, parameters, use_tqdm=False):
            (completion,) = output.outputs
            entries = [{token: given.logprob for token, given in entry.items()} for entry in completion.logprobs]
            tokens = tuple(completion.token_ids)
            given = tuple(entry[token] for token, entry in zip(tokens, entries, strict=True))
            answers.append(Answer(tokens, given, tuple(tuple(entry.items()) for entry in entries)))
        return answers

    def drafts(self) -> Drafts:
        """Counters since the engine started."""
        values = {metric.name: getattr(metric, "value", 0) for metric in self.llm.get_metrics()}
        prefix = "vllm:spec_decode_num_"
        return Drafts(
            drafted=values[f"{prefix}draft_tokens"],
            accepted=values[f"{prefix}accepted_tokens"],
            steps=values[f"{prefix}drafts"],
        )

    def prefix_cache_hits(self) -> int:
        """Prompt tokens taken from the prefix cache since the engine started."""
        return sum(getattr(m, "value", 0) for m in self.llm.get_metrics() if m.name == "vllm:prefix_cache_hits")


@contextmanager
def engine(
    checkpoint: Path, *, dtype: str = "float32", drafts: int = 0, eager: bool = True, **options: Any
) -> Iterator[Engine]:
    """Start ``LLM`` on a checkpoint; everything not named here is vLLM's default."""
    if drafts:
        options["speculative_config"] = {"method": "qwen3_next_mtp", "num_speculative_tokens": drafts}
    llm = LLM(
        str(checkpoint),
        dtype=dtype,
        enforce_eager=eager,
        max_model_len=1024,
        kv_cache_memory_bytes=256 << 20,
        disable_log_stats=False,
        **options,
    )
    try:
        yield Engine(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()


def printed_by(module: str, *arguments: str, **environment: str) -> Any:
    """The last line that ``python -m tests.vllm.<module>`` prints, parsed; the engine runs in that very process."""
    command = [sys.executable, "-m", f"tests.vllm.{module}", *arguments]
    environment = os.environ | environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
