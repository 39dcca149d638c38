"""Part ``speed`` of ``gpu_engines.py``: an engine with the plugin and with its own model, in turns."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from gpu_engines_report import Speed
from gpu_engines_serving import Answer, AnyEngine, Tokens

from qnext_plugins.cli.bench.models import Slice, SliceWork
from qnext_plugins.cli.bench.roofs import Roofs

BEGUN = 16
"""Tokens of each sequence before those that count: by then the last prompt of a batch has been read."""
COMMON = (2, 5, 17, 64, 65, 130, 257, 500)
"""Lengths of the prompts whose log-probabilities are compared."""
COMMON_ANSWER = 4
NOISE = 0.05
"""The largest mean |Δ log p| that is taken for rounding in bfloat16, in standard deviations of the log-probabilities.

On a CPU four layers of vLLM's own model and of ours are 0.009 (tiny) to 0.015 (real widths) apart. Ours with nine
experts in place of ten is 0.033 off, with another epsilon in its norms (1e-2) 0.6: what is close to the limit is for
the reader of the header to judge.
"""


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    model: Slice
    prefills: tuple[int, ...]
    batches: tuple[int, ...]
    context: int
    """Tokens of a prompt that is decoded behind."""
    steps: int
    """Of decode, in one turn."""
    rounds: int
    """Turns of each side that count; one before them warms up."""

    @property
    def tokens(self) -> int:
        """Of the longest request."""
        return max(*self.prefills, *COMMON, self.context + self.steps) + BEGUN + 1


@dataclass(frozen=True)
class Sides:
    """The engines that take turns, ours first; without the other if that does not start."""

    engines: list[AnyEngine]
    backend: str
    peer: str


def prompts_of(model: Slice, lengths: Sequence[int], seed: str) -> list[Tokens]:
    """Random tokens, the same for the same seed."""
    rng = random.Random(seed)
    return [tuple(rng.choices(range(1, model.vocabulary), k=length)) for length in lengths]


def difference(ours: Sequence[Answer], own: Sequence[Answer]) -> tuple[float, float]:
    """Mean and largest |Δ log p| of the same tokens, in standard deviations of the log-probabilities.

    The tokens are those of the prompts, and those of the answers up to the first where the sides part.
    """
    pairs: list[tuple[float, float]] = []
    for ours_one, own_one in zip(ours, own, strict=True):
        pairs += zip(ours_one.prompt_log_probs, own_one.prompt_log_probs, strict=True)
        answers = zip(ours_one.tokens, own_one.tokens, ours_one.log_probs, own_one.log_probs, strict=True)
        for token, other, log_prob, others in answers:
            if token != other:
                break
            pairs.append((log_prob, others))
    first, second = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    error = (first - second).abs() / second.std()
    return float(error.mean()), float(error.max())


def compare(sides: Sides, model: Slice) -> tuple[str, bool]:
    """A line that says how far apart the two are on common prompts, and whether that is rounding."""
    prompts = prompts_of(model, COMMON, "common")
    ours, own = (engine.answers(prompts, COMMON_ANSWER, read=True) for engine in sides.engines)
    mean, largest = difference(ours, own)
    first = sum(one.tokens[0] == other.tokens[0] for one, other in zip(ours, own, strict=True))
    read = sum(len(answer.prompt_log_probs) for answer in ours)
    line = (
        f"agreement on {len(prompts)} prompts: |Δ log p| {mean:.3f} on average and {largest:.2f} at most, in standard "
        f"deviations, over {read} tokens of the prompts and what follows; the first token is the same for {first}"
    )
    for engine in sides.engines:
        engine.forget()
    return line, mean <= NOISE


def medians(sides: Sides, rounds: int, run: Callable[[AnyEngine, int], float]) -> list[float]:
    """Median seconds of each side; they take turns, and the first turn, which warms up, does not count."""
    seen: list[list[float]] = [[] for _ in sides.engines]
    for turn in range(rounds + 1):
        for engine, times in zip(sides.engines, seen, strict=True):
            times.append(run(engine, turn))
            engine.forget()
    return [statistics.median(times[1:]) for times in seen]


def rows(sides: Sides, sizes: Sizes, roofs: Roofs, threads: int) -> Iterator[tuple[str, Callable[[], Speed]]]:
    """What is measured, in order: its name, and what measures it."""

    def row(op: str, shape: str, times: list[float], flops: float, moved: float, tokens: int) -> Speed:
        least, roof = roofs.seconds(threads, flops, moved)
        return Speed(
            op=op,
            shape=shape,
            ours_ms=times[0] * 1e3,
            backend=sides.backend,
            peer=sides.peer,
            peer_ms=times[1] * 1e3 if len(times) > 1 else None,
            roof_percent=100 * least / times[0],
            roof=roof,
            tokens=tokens,
        )

    work = SliceWork(sizes.model)
    # The short ones first: what the time does not allow is then the longest.
    for tokens in sizes.prefills:

        def prefill(tokens: int = tokens) -> Speed:
            times = medians(
                sides, sizes.rounds, lambda engine, turn: seconds_to_first_token(engine, sizes, tokens, turn)
            )
            flops, moved = work.flops(tokens, tokens), work.weights(tokens)
            return row("engine prefill", f"T={tokens}", times, flops, moved, tokens)

        yield f"prefill of {tokens}", prefill
    for batch in sizes.batches:

        def decode(batch: int = batch) -> Speed:
            times = medians(sides, sizes.rounds, lambda engine, turn: seconds_of_step(engine, sizes, batch, turn))
            context = sizes.context + BEGUN + sizes.steps // 2
            flops, moved = batch * work.flops(1, context), work.decode(context, batch=batch)
            return row("engine decode", f"B={batch} context={context}", times, flops, moved, batch)

        yield f"decode of {batch}", decode


def seconds_to_first_token(engine: AnyEngine, sizes: Sizes, tokens: int, turn: int) -> float:
    """Of one prompt that no prefix cache knows."""
    return engine.seconds(prompts_of(sizes.model, [tokens], f"prefill {tokens} {turn}"), 1)


def seconds_of_step(engine: AnyEngine, sizes: Sizes, batch: int, turn: int) -> float:
    """Of decode: of those that long answers take more than short ones, to other prompts of the same length."""
    lengths = [sizes.context] * batch
    long = engine.seconds(prompts_of(sizes.model, lengths, f"long {batch} {turn}"), BEGUN + sizes.steps)
    engine.forget()
    short = engine.seconds(prompts_of(sizes.model, lengths, f"short {batch} {turn}"), BEGUN)
    return (long - short) / sizes.steps
