"""How much rounding there is, measured: transformers in float32 and, on the same tokens, in the dtype of a side.

Two correct programs in bfloat16 can differ widely at a token, for example where rounding sends it to another expert.
So a side that computes in less than float32 is not held to a fixed number. With transformers as the referee, the
referee reads every continuation in float32 too, and in each dtype that a side computes in. A side's *error* is its
|Δ log p| from transformers in float32; up to ``TIMES`` the error of transformers itself in that dtype, on average over
the same tokens, is rounding, and more is a fault. That holds for tokens as they are read and as they were generated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qnext_plugins.cli.compare.report import Error, Key, Score, Side

ROUNDING = {"float32": 1e-3, "float16": 2**-6, "bfloat16": 2**-3}
"""The spacing of logits between 16 and 32, to which heads round them; in float32, where sums reorder, a thousandth."""
EXACT = "float32"
UNKNOWN = "bfloat16"
"""What a side is taken to compute in that does not say it."""
TOLERANCE = {EXACT: 1e-3}
UNKNOWN_TOLERANCE = 0.1
TIMES = 2

Numbers = npt.NDArray[np.float64]


def precision_of(side: Side) -> str:
    """The dtype that a side computes in, one of ``ROUNDING``."""
    return side.dtype if side.dtype in ROUNDING else UNKNOWN


def rounds(*sides: Side) -> bool:
    """Whether any of ``sides`` computes in less than float32."""
    return any(precision_of(side) != EXACT for side in sides)


def dtypes_to_read(sides: Sequence[Side], referee: Side) -> list[str]:
    """The dtypes besides its own in which ``referee`` must read everything so that rounding is measured."""
    numbered = [side for side in sides if any(answer.log_probs for answer in side.answers)]
    if referee.kind != "hf" or not rounds(*numbered):
        return []
    return sorted({EXACT, *map(precision_of, numbered)} - {precision_of(referee)})


def by_key(scores: Iterable[Score]) -> dict[Key, Score]:
    return {score.key: score for score in scores}


def differences(ours: Mapping[Key, Score], theirs: Mapping[Key, Score]) -> dict[Key, Numbers]:
    """|Δ log p| of each token of every continuation that both have."""
    shared = sorted(ours.keys() & theirs.keys())
    return {key: np.abs(np.subtract(ours[key].log_probs, theirs[key].log_probs)) for key in shared}


@dataclass(frozen=True)
class Measured:
    """Transformers' scores of every continuation, by dtype; ``EXACT`` is among them, or rounding was not measured."""

    scores: Mapping[str, Mapping[Key, Score]] = field(default_factory=dict)

    @classmethod
    def by(cls, referee: Side | None) -> Measured:
        """What ``referee`` has read; empty if it has not read anything in other dtypes than its own."""
        if referee is None or not referee.readings:
            return cls()
        every = {precision_of(referee): referee.scores, **referee.readings}
        return cls({dtype: by_key(scores) for dtype, scores in every.items()})

    @property
    def exact(self) -> Mapping[Key, Score]:
        """In float32; empty if rounding was not measured."""
        return self.scores.get(EXACT, {})

    def __contains__(self, dtype: str) -> bool:
        """Whether it is known how much this dtype rounds."""
        return EXACT in self.scores and dtype in self.scores

    def largest(self, dtype: str) -> float:
        """The largest error of transformers in ``dtype``, of all tokens that it has read."""
        errors = differences(self.scores[dtype], self.exact).values()
        return max((float(each.max()) for each in errors), default=0.0)

    def error_of(self, side: Side, scores: Iterable[Score], tolerance: float | None = None) -> Error | None:
        """The error of ``side`` in what it says of these continuations; None where it cannot be measured.

        ``tolerance``: what the user allows, if that was said.
        """
        dtype = precision_of(side)
        if dtype not in self:
            return None
        theirs, own = by_key(scores), differences(self.scores[dtype], self.exact)
        errors = {key: each for key, each in differences(theirs, self.exact).items() if key in own}
        if not errors:
            return None
        every = np.concatenate(list(errors.values()))
        usual = float(np.concatenate([own[key] for key in errors]).mean())
        return Error(
            dtype=dtype,
            tokens=len(every),
            mean=float(every.mean()),
            largest=float(every.max()),
            usual=usual,
            # Where even rounding moves nothing, what float32 is allowed is allowed.
            allowed=max(TIMES * usual, TOLERANCE[EXACT]) if tolerance is None else tolerance,
        )


def as_generated(side: Side) -> list[Score]:
    """A side's continuations with the log-probabilities it gave while it generated them."""
    return [
        Score(
            prompt=answer.prompt,
            prompt_ids=answer.prompt_ids or [],
            ids=answer.ids or [],
            author=side.name,
            log_probs=answer.log_probs,
            gaps=answer.gaps or [],
        )
        for answer in side.answers
        if answer.key is not None and answer.log_probs is not None
    ]


def measure_errors(sides: Sequence[Side], measured: Measured, tolerance: float | None = None) -> None:
    """Set each side's ``error_reading`` and ``error_generating``."""
    for side in sides:
        side.error_reading = measured.error_of(side, side.scores, tolerance)
        side.error_generating = measured.error_of(side, as_generated(side), tolerance)
