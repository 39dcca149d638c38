"""What transformers says: greedy continuations and log-probabilities."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, Qwen3NextForCausalLM

from examples.tiny.prompts import prompts
from examples.tiny.train import split_corpus

MAX_TOKENS = 64
MEMORY = Path(__file__).parents[1] / ".pytest_cache" / "transformers-greedy"
"""What ``greedy`` has computed, for the next run: a file for each checkpoint's bytes and version of transformers."""

Tokens = tuple[int, ...]


@cache
def load(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Qwen3NextForCausalLM:
    """The checkpoint in transformers."""
    return Qwen3NextForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()


@cache
def _memory_file(checkpoint: Path) -> Path:
    digest = hashlib.sha256(transformers.__version__.encode())
    for name in ("config.json", "model.safetensors"):
        digest.update((checkpoint / name).read_bytes())
    return MEMORY / f"{digest.hexdigest()[:16]}.jsonl"


@cache
def _remembered(file: Path) -> dict[tuple[Tokens, int], Tokens]:
    lines = file.read_text().splitlines() if file.exists() else []
    entries = [json.loads(line) for line in lines]
    return {(tuple(prompt), max_tokens): tuple(answer) for prompt, max_tokens, answer in entries}


def greedy(checkpoint: Path, prompt: Tokens, max_tokens: int = MAX_TOKENS) -> Tokens:
    """The greedy continuation in float32, through transformers' cache; computed once, then read from ``MEMORY``."""
    file = _memory_file(checkpoint)
    remembered = _remembered(file)
    if (prompt, max_tokens) not in remembered:
        remembered[prompt, max_tokens] = answer = _generate(checkpoint, prompt, max_tokens)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            lines.write(json.dumps([prompt, max_tokens, answer]) + "\n")
    return remembered[prompt, max_tokens]


@torch.inference_mode()
def _generate(checkpoint: Path, prompt: Tokens, max_tokens: int) -> Tokens:
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


def likelihood_deviation(checkpoint: Path, prompts: Sequence[Tokens], samples: Sequence[Tokens]) -> float:
    """How many standard deviations the likelihood of sampled tokens is from what their distributions say.

    A sum of martingale differences: normal, with mean zero, if every token is drawn from its distribution.
    """
    surprise, variance = 0.0, 0.0
    for prompt, tokens in zip(prompts, samples, strict=True):
        log_probs = distributions(checkpoint, prompt, tokens)
        entropy = -(log_probs.exp() * log_probs).sum(dim=1)
        given = log_probs.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        surprise += float((given + entropy).sum())
        variance += float((log_probs.exp() * (log_probs + entropy[:, None]) ** 2).sum())
    return surprise / variance**0.5


def largest_error(checkpoint: Path, prompts: Sequence[Tokens], results: Sequence[tuple[Tokens, Tensor]]) -> float:
    """Largest |Δ log p| of tokens that an engine gave with their log-probabilities, against float32."""
    return max(
        float((given - log_probs(checkpoint, prompt, tokens)).abs().max())
        for prompt, (tokens, given) in zip(prompts, results, strict=True)
    )


def bfloat16_error_ratio(
    checkpoint: Path, prompts: Sequence[Tokens], results: Sequence[tuple[Tokens, Tensor]]
) -> float:
    """Mean |Δ log p| of an engine's tokens against float32, over that of transformers in bfloat16."""
    ours, theirs = [], []
    for prompt, (tokens, given) in zip(prompts, results, strict=True):
        truth = log_probs(checkpoint, prompt, tokens)
        ours.append((given - truth).abs())
        theirs.append((log_probs(checkpoint, prompt, tokens, torch.bfloat16) - truth).abs())
    mean_ours, mean_theirs = torch.cat(ours).mean().item(), torch.cat(theirs).mean().item()
    print(f"mean |Δ log p| against float32: ours {mean_ours:.5f}, transformers' bfloat16 {mean_theirs:.5f}")
    return mean_ours / mean_theirs


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
