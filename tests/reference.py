"""What transformers says: greedy continuations and log-probabilities, computed once a test run."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen3NextForCausalLM

from examples.tiny.train import split_corpus

PROMPT_LENGTHS = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 33, 40, 48, 57, 63, 64, 65, 70, 85, 99, 110, 127, 128, 129, 130)
LONG_PROMPT_LENGTHS = (150, 191, 192, 193, 220, 255, 256, 257, 280, 300)
MAX_TOKENS = 64

Tokens = tuple[int, ...]


@cache
def load(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Qwen3NextForCausalLM:
    """The checkpoint in transformers."""
    return Qwen3NextForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()


@cache
def prompts(checkpoint: Path) -> tuple[Tokens, ...]:
    """Passages of Python's documentation, 1 to 300 tokens long, each from another topic."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    lengths = PROMPT_LENGTHS + LONG_PROMPT_LENGTHS
    long_topics = sorted(name for name, text in pydoc_data.topics.topics.items() if len(text) > 2400)
    chosen = [long_topics[n % len(long_topics)] for n in range(len(lengths))]
    passages = [pydoc_data.topics.topics[name][200 + 50 * n :][:2000] for n, name in enumerate(chosen)]
    return tuple(tuple(tokenizer.encode(text)[:length]) for text, length in zip(passages, lengths, strict=True))


@cache
@torch.inference_mode()
def greedy(checkpoint: Path, prompt: Tokens, max_tokens: int = MAX_TOKENS) -> Tokens:
    """The greedy continuation in float32, through transformers' cache."""
    ids = torch.tensor([prompt])
    output = load(checkpoint).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(output[0, len(prompt) :].tolist())


@torch.inference_mode()
def log_probs(checkpoint: Path, prompt: Tokens, continuation: Tokens, dtype: torch.dtype = torch.float32) -> Tensor:
    """Teacher-forced log-probabilities [len(continuation)] of a continuation, in float32 from logits of ``dtype``."""
    given = distributions(checkpoint, prompt, continuation, dtype)
    return given.gather(1, torch.tensor(continuation)[:, None]).squeeze(1)


@torch.inference_mode()
def distributions(checkpoint: Path, prompt: Tokens, continuation: Tokens, dtype: torch.dtype = torch.float32) -> Tensor:
    """Log-probabilities [len(continuation), vocabulary] that each token of a continuation is drawn from."""
    ids = torch.tensor([prompt + continuation])
    return load(checkpoint, dtype)(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(dim=-1)


def first_difference(expected: Sequence[Tokens], got: Sequence[Tokens]) -> str | None:
    """Describe the first prompt whose tokens differ, or None."""
    for n, (want, have) in enumerate(zip(expected, got, strict=True)):
        if want != have:
            at = next((i for i, pair in enumerate(zip(want, have, strict=False)) if pair[0] != pair[1]), len(have))
            return f"prompt {n} parts at token {at}: expected {want[at : at + 4]}, got {have[at : at + 4]}"
    return None


def turns(checkpoint: Path, prompt: Tokens, count: int) -> Iterator[tuple[Tokens, Tokens]]:
    """A conversation: each turn's prompt is all that was said, with a few new tokens; and what transformers answers."""
    for turn in range(count):
        answer = greedy(checkpoint, prompt)
        yield prompt, answer
        prompt = prompt + answer + tuple(prompts(checkpoint)[-1][7 * turn : 7 * turn + 7])


def held_out_prompts(checkpoint: Path, length: int = 48) -> list[Tokens]:
    """Passages of the topics that the trained checkpoint has not read."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    _, held_out = split_corpus()
    prompts = []
    for text in held_out.values():
        ids = tokenizer.encode(text)
        prompts += [tuple(ids[start : start + length]) for start in range(0, len(ids) - length, 4 * length)]
    return prompts
