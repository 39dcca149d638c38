"""Part ``exact`` of ``gpu_engines.py``: are an engine's greedy answers those of transformers in float32?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from gpu_engines_report import Exact
from gpu_engines_serving import Answer, AnyEngine, Counters, Tokens
from torch import Tensor

TOKENS = 64
ALONE = 4
"""One prompt of so many is asked alone too."""


class Reference:
    """transformers on the CPU. It reads prompt and answer at once: a greedy answer is the likeliest token everywhere.

    Args:
        checkpoint: a folder.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        for library in ("fla", "causal_conv1d"):
            sys.modules[library] = None  # type: ignore[assignment]  # transformers would call their kernels for GPUs
        self._load, self._read = cache(self._load), cache(self._read)  # type: ignore[method-assign]

    def distributions(self, prompt: Tokens, answer: Tokens, dtype: torch.dtype) -> Tensor:
        """Log-probabilities [len(answer), vocabulary], float32 from logits of ``dtype``."""
        return self._read(prompt, answer, dtype)

    def _load(self, dtype: torch.dtype) -> torch.nn.Module:
        from transformers import Qwen3NextForCausalLM

        return Qwen3NextForCausalLM.from_pretrained(self.checkpoint, dtype=dtype).eval()

    @torch.inference_mode()
    def _read(self, prompt: Tokens, answer: Tokens, dtype: torch.dtype) -> Tensor:
        ids = torch.tensor([prompt + answer])
        return self._load(dtype)(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(dim=-1)


def ask(engine: AnyEngine, prompts: Sequence[Tokens]) -> list[tuple[str, list[Tokens], list[Answer], Counters]]:
    """How an engine that was just started is asked, what, what it answers, and its counters of that."""
    asked: list[tuple[str, list[Tokens], list[Answer], Counters]] = []

    def note(how: str, given: list[Tokens], batches: list[list[Tokens]]) -> None:
        before = engine.counters()
        answers = [answer for batch in batches for answer in engine.answers(batch, TOKENS)]
        counted = Counters(*(now - then for now, then in zip(engine.counters(), before, strict=True)))
        asked.append((how, given, answers, counted))

    everything = list(prompts)
    note("batched", everything, [everything])
    note("from the cache", everything, [everything])
    engine.forget()
    some = everything[::ALONE]
    note("alone", some, [[prompt] for prompt in some])
    return asked


def judge(
    reference: Reference,
    dtype: str,
    drafts: int,
    asked: tuple[str, list[Tokens], list[Answer], Counters],
    without_drafts: dict[Tokens, Tokens],
) -> Exact:
    """What there is to say of what :func:`ask` gives; ``without_drafts``: by prompt, the answers of that dtype."""
    how, prompts, answers, counted = asked
    gaps, errors, usual = [], [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        truth = reference.distributions(prompt, answer.tokens, torch.float32)
        taken = truth.gather(1, torch.tensor(answer.tokens)[:, None]).squeeze(1)
        parted = (truth.amax(dim=1) - taken).nonzero().flatten().tolist()
        if parted:
            gaps.append(float(truth[parted[0]].max() - taken[parted[0]]))
        errors.append((torch.tensor(answer.log_probs) - taken).abs())
        if dtype != "float32":
            rounded = reference.distributions(prompt, answer.tokens, getattr(torch, dtype))
            usual.append((rounded.gather(1, torch.tensor(answer.tokens)[:, None]).squeeze(1) - taken).abs())
    same = [without_drafts.get(prompt) == answer.tokens for prompt, answer in zip(prompts, answers, strict=True)]
    error = torch.cat(errors)
    return Exact(
        dtype=dtype,
        drafts=drafts,
        how=how,
        answers=len(answers),
        equal=len(answers) - len(gaps),
        gap=max(gaps, default=0.0),
        mean=float(error.mean()),
        largest=float(error.max()),
        usual=float(torch.cat(usual).mean()) if usual else None,
        as_without_drafts=sum(same) if drafts and without_drafts else None,
        cached=counted.cached,
        tokens_a_step=1 + counted.accepted / counted.steps if drafts and counted.steps else None,
    )
