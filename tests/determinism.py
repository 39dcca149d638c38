"""What is asked of either engine in its deterministic mode: the same request alone and among others, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tests.reference import Tokens

MAX_TOKENS = 16


@dataclass(frozen=True)
class Request:
    """A prompt, its sampling parameters (a ``seed`` among them) and how many top log-probabilities it wants."""

    prompt: Tokens
    parameters: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0})
    top: int = 2


@dataclass(frozen=True)
class Answer:
    """Tokens; for each its log-probability and the top ones, which are pairs of token and log-probability."""

    tokens: Tokens
    log_probs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]

    def behind(self, request: Request, known: int) -> tuple[Request, Answer]:
        """The request whose prompt has the first ``known`` tokens of this answer to ``request``, and its answer."""
        parts = (part[known:] for part in (self.tokens, self.log_probs, self.top))
        return replace(request, prompt=request.prompt + self.tokens[:known]), Answer(*parts)


class Engine(Protocol):
    """What the engines of the tests have in common here."""

    def answers(self, requests: Sequence[Request], max_tokens: int) -> list[Answer]:
        """Answers to all requests at once."""


SEEDED = {"temperature": 1.0, "seed": 5}
OTHERS: list[tuple[dict[str, Any], int]] = [
    ({"temperature": 0.0}, 7),
    ({"temperature": 1.0}, 0),
    ({"temperature": 0.9, "top_p": 0.8}, 4),
    ({"temperature": 1.0, "top_k": 3, "seed": 3}, 1),
]
"""Some of the others sample: the engines then compute with the whole batch what they skip for greedy requests alone."""


@dataclass(frozen=True)
class Requests:
    """Six requests of 7 to 300 tokens, and 24 others."""

    greedy: list[Request]
    seeded: list[Request]
    """Three of the six, with a seed."""
    others: list[Request]

    @classmethod
    def of(cls, prompts: Sequence[Tokens]) -> Requests:
        chosen = prompts[5::6]
        rest = [prompt for n, prompt in enumerate(prompts) if n % 6 != 5][:24]
        return cls(
            greedy=[Request(prompt) for prompt in chosen],
            seeded=[Request(prompt, SEEDED) for prompt in chosen[::2]],
            others=[Request(prompt, *OTHERS[n % len(OTHERS)]) for n, prompt in enumerate(rest)],
        )


def alone(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    return [engine.answers([request], MAX_TOKENS)[0] for request in requests]


def among(engine: Engine, requests: Sequence[Request], others: Sequence[Request]) -> list[Answer]:
    """Answers to ``requests``, spread over the others, which come at the same time."""
    step = 1 + len(others) // len(requests)
    mixed = list(others)
    for n, request in enumerate(requests):
        mixed.insert(n * step, request)
    return engine.answers(mixed, MAX_TOKENS)[: len(requests) * step : step]
