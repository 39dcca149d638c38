"""Who agrees with whom: partings of greedy continuations, |Δ log p| of given tokens, what is a tie and what a fault.

Two correct servers sum in different orders, so their log-probabilities differ by rounding. Where the best two tokens
are closer than that, either may win: a *tie*. How close is measured: every side reads its own continuation once more as
a prompt, and what changes is its *noise*. A parting is a tie if on both sides the gap between the best two tokens is at
most

    margin = max(rounding of either dtype, 2 · (99th percentile of one side's noise + that of the other))

and a *fault* otherwise. ``ROUNDING`` is the spacing of logits between 16 and 32 in bfloat16 and float16, whose heads
round them to it; in float32, where sums reorder rather than round, a thousandth. Independent of what is written, two
sides disagree if the mean |Δ log p| of the same given tokens exceeds a tolerance, or a single one fifty times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from qnext_plugins.cli.compare.report import (
    Answer,
    Deltas,
    Key,
    Kind,
    Noise,
    Pair,
    Parting,
    Place,
    Score,
    Side,
    Unit,
)

ROUNDING = {"float32": 1e-3, "float16": 2**-6, "bfloat16": 2**-3}
TOLERANCE = {"float32": 1e-3}
UNKNOWN_ROUNDING = ROUNDING["bfloat16"]
UNKNOWN_TOLERANCE = 0.1
SPIKE = 50
COMMON_CHARACTERS = 60

Numbers = npt.NDArray[np.float64]


def scores_by_key(side: Side) -> dict[Key, Score]:
    return {score.key: score for score in side.scores}


def own_differences(side: Side) -> Numbers:
    """|Δ log p| of each token that a side generated and has then read."""
    scores = scores_by_key(side)
    parts = [
        np.abs(np.subtract(answer.log_probs, scores[key].log_probs))
        for answer in side.answers
        if (key := answer.key) is not None and key in scores and answer.log_probs
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def pair_differences(a: Side, b: Side) -> dict[Key, Numbers]:
    """|Δ log p| of each token of every continuation that both have read."""
    ours, theirs = scores_by_key(a), scores_by_key(b)
    shared = sorted(ours.keys() & theirs.keys())
    return {key: np.abs(np.subtract(ours[key].log_probs, theirs[key].log_probs)) for key in shared}


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


def tolerance_of(sides: Sequence[Side], given: float | None = None) -> float:
    """The largest mean |Δ log p| that is agreement between ``sides``."""
    if given is not None:
        return given
    return max(TOLERANCE.get(side.dtype or "", UNKNOWN_TOLERANCE) for side in sides)


def margin_of(a: Side, b: Side, given: float | None = None) -> float:
    """The largest gap of the best two tokens that leaves open which is taken; see the module's docstring."""
    if given is not None:
        return given
    rounding = max(ROUNDING.get(side.dtype or "", UNKNOWN_ROUNDING) for side in (a, b))
    # A side that contradicts itself is broken, not noisy: its noise excuses nothing.
    noise = sum(side.noise.p99 for side in (a, b) if side.noise is not None and side.consistent)
    return max(rounding, 2 * noise)


def compare_all(sides: Sequence[Side], *, tie_gap: float | None = None, tolerance: float | None = None) -> list[Pair]:
    """Measure each side's noise and compare every two that answered something."""
    for side in sides:
        side.noise = own_noise(side)
        side.consistent = None if side.noise is None else side.noise.mean <= tolerance_of([side], tolerance)
    return [
        compare_pair(a, b, margin=margin_of(a, b, tie_gap), tolerance=tolerance_of([a, b], tolerance))
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


def compare_pair(a: Side, b: Side, *, margin: float, tolerance: float) -> Pair:
    """Compare two sides on the prompts that both answered."""
    ours = {answer.prompt: answer for answer in a.answers}
    theirs = {answer.prompt: answer for answer in b.answers}
    shared = sorted(ours.keys() & theirs.keys())
    unit = common_unit([ours[n] for n in shared], [theirs[n] for n in shared])
    other_prompts = [
        n for n in shared if None not in (x := (ours[n].prompt_ids, theirs[n].prompt_ids)) and x[0] != x[1]
    ]
    partings, tokens = [], 0
    for number in (n for n in shared if n not in other_prompts):
        one, two = units(ours[number], unit), units(theirs[number], unit)
        position = next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), None)
        tokens += min(len(one), len(two)) if position is None else position
        if position is not None:
            partings.append(_parting(ours[number], theirs[number], unit, position, (a, b), margin))
    pair = Pair(
        a=a.name,
        b=b.name,
        unit=unit,
        prompts=len(shared),
        identical=len(shared) - len(other_prompts) - len(partings),
        tokens=tokens,
        other_prompts=other_prompts,
        partings=partings,
        margin=margin,
        tolerance=tolerance,
        deltas=_deltas(a, b),
        agrees=None,
        reasons=[],
    )
    _judge(pair)
    return pair


def _parting(one: Answer, two: Answer, unit: Unit, position: int, sides: tuple[Side, Side], margin: float) -> Parting:
    gaps = [
        None if unit is Unit.characters else _gap_at(answer, side, position)
        for answer, side in zip((one, two), sides, strict=True)
    ]
    known = [gap for gap in gaps if gap is not None]
    kind = Kind.tie if len(known) == 2 else Kind.unknown
    if any(gap > margin for gap in known):
        kind = Kind.fault
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
        kind=kind,
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
    score = scores_by_key(side).get(answer.key) if answer.key else None
    return score.gaps[position] if score is not None and position < len(score.gaps) else None


def _deltas(a: Side, b: Side) -> Deltas | None:
    """|Δ log p| of every continuation that both scored; None if there is none."""
    differences = pair_differences(a, b)
    if not differences:
        return None
    worst = max(differences, key=lambda key: float(differences[key].max()))
    position = int(differences[worst].argmax())
    score = scores_by_key(a)[worst]
    every = np.concatenate(list(differences.values()))
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
            b_log_prob=scores_by_key(b)[worst].log_probs[position],
        ),
    )


def _judge(pair: Pair) -> None:
    """Set ``agrees`` and ``reasons`` from what was measured."""
    against: list[str] = []
    if pair.other_prompts:
        against.append(f"{len(pair.other_prompts)} prompts become different tokens (first: {pair.other_prompts[0]})")
    if faults := pair.faults():
        against.append(f"{len(faults)} of {pair.prompts} continuations part, {describe(faults[0], pair)}")
    if pair.deltas is not None:
        size = f"mean |Δ log p| {pair.deltas.mean:.2g}, largest {pair.deltas.largest:.2g}"
        if pair.deltas.mean > pair.tolerance:
            against.append(f"{size}, where a mean of {pair.tolerance:g} is allowed")
        elif pair.deltas.largest > SPIKE * pair.tolerance:
            against.append(f"{size}, where one of {SPIKE * pair.tolerance:g} is allowed")
        else:
            pair.reasons.append(f"{size} over {pair.deltas.tokens} tokens")
    if ties := len(pair.partings) - len(faults):
        pair.reasons.append(f"{ties} ties (both gaps at most {pair.margin:.2g})")
    if pair.prompts:
        pair.reasons.insert(0, f"{pair.identical} of {pair.prompts} continuations identical by {pair.unit}")
        pair.agrees = not against
    elif pair.deltas is not None:
        pair.agrees = not against
    if against:
        pair.reasons = against + pair.reasons


def describe(parting: Parting, pair: Pair) -> str:
    """One parting in words."""
    gaps = [("no gap known" if gap is None else f"gap {gap:.2g}") for gap in (parting.a_gap, parting.b_gap)]
    return (
        f"first in prompt {parting.prompt} at {pair.unit.removesuffix('s')} {parting.position}: "
        f"{pair.a} {parting.a!r} ({gaps[0]}), {pair.b} {parting.b!r} ({gaps[1]}), a tie up to {pair.margin:.2g}"
    )
