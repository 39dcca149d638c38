"""Who agrees with whom: partings of greedy continuations, |Δ log p| of given tokens, what is a tie and what a fault.

Two correct servers sum in different orders, so their log-probabilities differ by rounding. Where the best two tokens
are closer than that, either may win: a *tie*. How close is measured: every side reads its own continuation once more as
a prompt, and what changes is its *noise*. A parting is a tie if on both sides the gap between the best two tokens is at
most

    margin = max(rounding of either dtype, 2 · (99th percentile of one side's noise + that of the other))

In float32 any other parting is a *fault*, and two sides disagree besides if the mean |Δ log p| of the same given tokens
exceeds a tolerance, or a single one fifty times as much.

In less than float32 rounding moves log-probabilities further than a tie is wide. With E the largest error of
transformers in a side's dtype (``rounding``), the gap of two tokens on one side is no more than the errors of both
tokens on both sides: a parting is *rounding* up to 2 · (E of one side + E of the other), and beyond that, or where a
side's own errors are no rounding, a fault. The sides are judged by their own errors, and what those are allowed is
together the tolerance of the pair. Without transformers to measure it, a parting that is no tie stays *unknown*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from qnext_plugins.cli.compare.report import (
    Answer,
    Deltas,
    Key,
    Kind,
    Noise,
    Pair,
    Parting,
    Place,
    Side,
    Unit,
)
from qnext_plugins.cli.compare.rounding import (
    ROUNDING,
    TOLERANCE,
    UNKNOWN_TOLERANCE,
    Measured,
    Numbers,
    as_generated,
    by_key,
    differences,
    measure_errors,
    precision_of,
    rounds,
)

SPIKE = 50
COMMON_CHARACTERS = 60


def own_differences(side: Side) -> Numbers:
    """|Δ log p| of each token that a side generated and has then read."""
    return joined(differences(by_key(as_generated(side)), by_key(side.scores)))


def pair_differences(a: Side, b: Side) -> dict[Key, Numbers]:
    """|Δ log p| of each token of every continuation that both have read."""
    return differences(by_key(a.scores), by_key(b.scores))


def joined(parts: Mapping[Key, Numbers]) -> Numbers:
    """All of them in one array."""
    return np.concatenate(list(parts.values())) if parts else np.empty(0)


def own_noise(side: Side) -> Noise | None:
    """How far a side is from itself when it reads its own tokens; None if it gave no numbers or scored none."""
    differences = own_differences(side)
    if not len(differences):
        return None
    return Noise(
        tokens=len(differences),
        mean=float(differences.mean()),
        p99=float(np.percentile(differences, 99)),
        largest=float(differences.max()),
    )


def tolerance_of(*sides: Side, given: float | None = None) -> float:
    """The largest mean |Δ log p| that is agreement between ``sides``."""
    if given is not None:
        return given
    if not rounds(*sides):
        return TOLERANCE["float32"]
    allowed = [side.error_reading.allowed for side in sides if side.error_reading is not None]
    return sum(allowed) if len(allowed) == len(sides) else UNKNOWN_TOLERANCE


def margin_of(a: Side, b: Side, given: float | None = None) -> float:
    """The largest gap of the best two tokens that leaves open which is taken; see the module's docstring."""
    if given is not None:
        return given
    rounding = max(ROUNDING[precision_of(side)] for side in (a, b))
    # A side that contradicts itself is broken, not noisy: its noise excuses nothing.
    noise = sum(side.noise.p99 for side in (a, b) if side.noise is not None and side.consistent)
    return max(rounding, 2 * noise)


@dataclass(frozen=True)
class Judge:
    """What two sides are held to."""

    margin: float
    tolerance: float
    strict: bool
    """Whether a parting beyond the margin is a fault: in float32, and where the user has said what a tie is."""
    rounding: float | None = None
    """The largest gap that is rounding; None if not measured."""

    def kind_of(self, gaps: Sequence[float | None]) -> Kind:
        """What a parting is, by the gap on each side."""
        known = [gap for gap in gaps if gap is not None]
        largest, limit = max(known, default=0.0), max(self.margin, self.rounding or 0.0)
        if largest > limit and (self.strict or self.rounding is not None):
            return Kind.fault
        if largest > limit or len(known) < 2:
            return Kind.unknown
        return Kind.tie if largest <= self.margin else Kind.rounding

    @classmethod
    def of(cls, a: Side, b: Side, measured: Measured, *, tie_gap: float | None, tolerance: float | None) -> Judge:
        strict = tie_gap is not None or not rounds(a, b)
        dtypes = (precision_of(a), precision_of(b))
        known = not strict and all(dtype in measured for dtype in dtypes)
        margin = margin_of(a, b, tie_gap)
        rounding = 2 * sum(measured.largest(dtype) for dtype in dtypes) if known else None
        # What goes beyond rounding on average is not excused by it anywhere.
        if known and not all(error.is_rounding for error in (*a.errors, *b.errors)):
            rounding = margin
        return cls(
            margin=margin,
            tolerance=tolerance_of(a, b, given=tolerance),
            strict=strict,
            rounding=rounding,
        )


def compare_all(
    sides: Sequence[Side],
    *,
    referee: str | None = None,
    tie_gap: float | None = None,
    tolerance: float | None = None,
) -> list[Pair]:
    """Measure each side's noise and errors and compare every two that answered something."""
    measured = Measured.by(next((side for side in sides if side.name == referee), None))
    measure_errors(sides, measured, tolerance)
    for side in sides:
        side.noise = own_noise(side)
        side.consistent = None
        if side.noise is not None:
            side.consistent = side.noise.mean <= tolerance_of(side, given=tolerance)
    return [
        compare_pair(a, b, Judge.of(a, b, measured, tie_gap=tie_gap, tolerance=tolerance))
        for a, b in combinations(sides, 2)
    ]


def common_unit(a: Sequence[Answer], b: Sequence[Answer]) -> Unit:
    """The most exact unit that all answers have."""
    answers = [*a, *b]
    if all(answer.ids is not None for answer in answers):
        return Unit.ids
    if all(answer.texts is not None for answer in answers):
        return Unit.texts
    return Unit.characters


def units(answer: Answer, unit: Unit) -> Sequence[int | str]:
    """An answer as a sequence of ``unit``, which it must have."""
    sequences: dict[Unit, Sequence[int | str] | None] = {
        Unit.ids: answer.ids,
        Unit.texts: answer.texts,
        Unit.characters: answer.text,
    }
    sequence = sequences[unit]
    assert sequence is not None, f"the answer has no {unit}"
    return sequence


def compare_pair(a: Side, b: Side, judge: Judge) -> Pair:
    """Compare two sides on the prompts that both answered."""
    ours = {answer.prompt: answer for answer in a.answers}
    theirs = {answer.prompt: answer for answer in b.answers}
    shared = sorted(ours.keys() & theirs.keys())
    unit = common_unit([ours[n] for n in shared], [theirs[n] for n in shared])
    other_prompts = [
        n for n in shared if None not in (x := (ours[n].prompt_ids, theirs[n].prompt_ids)) and x[0] != x[1]
    ]
    places, tokens = {}, 0
    for number in (n for n in shared if n not in other_prompts):
        one, two = units(ours[number], unit), units(theirs[number], unit)
        position = next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), None)
        tokens += min(len(one), len(two)) if position is None else position
        if position is not None:
            places[number] = position
    pair = Pair(
        a=a.name,
        b=b.name,
        unit=unit,
        prompts=len(shared),
        identical=len(shared) - len(other_prompts) - len(places),
        tokens=tokens,
        other_prompts=other_prompts,
        partings=[_parting(ours[n], theirs[n], unit, place, (a, b), judge) for n, place in places.items()],
        margin=judge.margin,
        rounding=judge.rounding,
        tolerance=judge.tolerance,
        deltas=_deltas(a, b),
        agrees=None,
        reasons=[],
    )
    _conclude(pair, (a, b))
    return pair


def _parting(one: Answer, two: Answer, unit: Unit, position: int, sides: tuple[Side, Side], judge: Judge) -> Parting:
    gaps = [
        None if unit is Unit.characters else _gap_at(answer, side, position)
        for answer, side in zip((one, two), sides, strict=True)
    ]
    texts = [_as_texts(answer, unit) for answer in (one, two)]
    return Parting(
        prompt=one.prompt,
        position=position,
        common="".join(texts[0][:position])[-COMMON_CHARACTERS:],
        a=texts[0][position],
        b=texts[1][position],
        a_next="".join(texts[0][position + 1 :])[:COMMON_CHARACTERS],
        b_next="".join(texts[1][position + 1 :])[:COMMON_CHARACTERS],
        a_gap=gaps[0],
        b_gap=gaps[1],
        kind=judge.kind_of(gaps),
    )


def _as_texts(answer: Answer, unit: Unit) -> list[str]:
    """Something to show for each unit of an answer."""
    if unit is Unit.characters:
        return list(answer.text)
    return answer.texts or [f"⟨{token}⟩" for token in answer.ids or []]


def _gap_at(answer: Answer, side: Side, position: int) -> float | None:
    """The gap of the best two tokens there, from generating, otherwise from reading the same tokens."""
    if answer.gaps and position < len(answer.gaps) and answer.gaps[position] is not None:
        return answer.gaps[position]
    score = by_key(side.scores).get(answer.key) if answer.key else None
    return score.gaps[position] if score is not None and position < len(score.gaps) else None


def _deltas(a: Side, b: Side) -> Deltas | None:
    """|Δ log p| of every continuation that both scored; None if there is none."""
    found = pair_differences(a, b)
    if not found:
        return None
    worst = max(found, key=lambda key: float(found[key].max()))
    position = int(found[worst].argmax())
    score = by_key(a.scores)[worst]
    every = joined(found)
    return Deltas(
        tokens=len(every),
        mean=float(every.mean()),
        p99=float(np.percentile(every, 99)),
        largest=float(every.max()),
        worst=Place(
            prompt=score.prompt,
            position=position,
            token=score.ids[position],
            text=score.texts[position] if score.texts else None,
            author=score.author,
            a_log_prob=score.log_probs[position],
            b_log_prob=by_key(b.scores)[worst].log_probs[position],
        ),
    )


def _conclude(pair: Pair, sides: tuple[Side, Side]) -> None:
    """Set ``agrees`` and ``reasons`` from what was measured."""
    if not pair.compared:
        return
    against = [
        f"{side.name} is further from float32 than rounding"
        for side in sides
        if not all(error.is_rounding for error in side.errors)
    ]
    if pair.other_prompts:
        against.append(f"{len(pair.other_prompts)} prompts become different tokens (first: {pair.other_prompts[0]})")
    if faults := pair.partings_of(Kind.fault):
        limit = max(pair.margin, pair.rounding or 0.0)
        against.append(f"{_part(faults, pair)}, {describe(faults[0], pair)}, where up to {limit:.2g} is allowed")
    within: list[str] = []
    if pair.deltas is not None:
        size = f"mean |Δ log p| {pair.deltas.mean:.2g}, largest {pair.deltas.largest:.2g}"
        if pair.deltas.mean > pair.tolerance:
            against.append(f"{size}, where a mean of {pair.tolerance:.2g} is allowed")
        elif pair.deltas.largest > SPIKE * pair.tolerance:
            against.append(f"{size}, where one of {SPIKE * pair.tolerance:.2g} is allowed")
        else:
            within.append(f"{size} over {pair.deltas.tokens} tokens")
    if ties := pair.partings_of(Kind.tie):
        within.append(f"{_counted(ties, 'tie')} (both gaps at most {pair.margin:.2g})")
    if rounded := pair.partings_of(Kind.rounding):
        within.append(
            f"{_counted(rounded, 'parting')} that rounding can explain (gaps up to {_widest(rounded):.2g}, "
            f"where it can explain {pair.rounding:.2g})"
        )
    unknown = pair.partings_of(Kind.unknown)
    if pair.prompts:
        within.insert(0, f"{pair.identical} of {pair.prompts} continuations identical by {pair.unit}")
    if unknown:
        open_ = f"{_part(unknown, pair)}, {describe(unknown[0], pair)}, and nothing says whether that is a fault"
        within.insert(0, open_)
    pair.agrees = False if against else None if unknown else True
    pair.reasons = against + within


def _counted(partings: Sequence[Parting], noun: str) -> str:
    return f"{len(partings)} {noun}{'' if len(partings) == 1 else 's'}"


def _part(partings: Sequence[Parting], pair: Pair) -> str:
    return f"{len(partings)} of {pair.prompts} continuations part"


def _widest(partings: Sequence[Parting]) -> float:
    """The largest gap."""
    return max(gap for parting in partings for gap in (parting.a_gap, parting.b_gap) if gap is not None)


def describe(parting: Parting, pair: Pair) -> str:
    """One parting in words."""
    gaps = [("no gap known" if gap is None else f"gap {gap:.2g}") for gap in (parting.a_gap, parting.b_gap)]
    return (
        f"first in prompt {parting.prompt} at {pair.unit.removesuffix('s')} {parting.position}: "
        f"{pair.a} {parting.a!r} ({gaps[0]}), {pair.b} {parting.b!r} ({gaps[1]})"
    )
