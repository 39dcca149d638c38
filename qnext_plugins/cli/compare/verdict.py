"""Puts what was found in words."""

from __future__ import annotations

from collections.abc import Sequence

from qnext_plugins.cli.compare.report import Level, Pair, Report, Side, Status
from qnext_plugins.cli.compare.rounding import rounds


def choose_referee(sides: Sequence[Side], wanted: str | None) -> str | None:
    """The side whose word decides: the wanted one, else transformers, else the third; None with two servers."""
    originals = [side for side in sides if side.without_drafts_of is None]
    if wanted is not None:
        return wanted
    transformers = next((side.name for side in originals if side.kind == "hf"), None)
    return transformers or (originals[2].name if len(originals) > 2 else None)


def conclude(report: Report) -> None:
    """Set ``status`` and ``verdict`` from the sides and pairs."""
    inconsistent = [side for side in report.sides if side.consistent is False]
    wrong = [side for side in report.sides if not all(error.is_rounding for error in side.errors)]
    compared = [pair for pair in report.pairs if pair.compared]
    disagree = [pair for pair in compared if pair.agrees is False]
    undecided = [pair for pair in report.pairs if pair.agrees is None]
    missing = [f"{side.name}: {problem}" for side in report.sides for problem in side.problems]
    missing += [f"{pair.a} and {pair.b} could not be compared." for pair in undecided if not pair.compared]
    lines = [_blame(report, disagree)] if disagree else []
    lines += [
        f"{side.name} contradicts itself: reading its own tokens changes their log-probability by "
        f"{side.noise.mean:.2g} on average, so what it generates is not what it computes."
        for side in inconsistent
        if side.noise is not None
    ]
    lines += [line for side in report.sides for line in _errors(side, report.referee)]
    lines += [f"{pair.a} and {pair.b}{_outcome(pair)}: {'; '.join(pair.reasons)}." for pair in compared]
    lines += _unmeasured(report)
    lines += _speed(report.sides) + _drafts(report.sides)
    if missing:
        lines.append(f"Not everything could be done: {len(missing)} problems, the first: {missing[0]}")
    if report.interrupted:
        lines.append("The comparison was interrupted; this is what there was by then.")
    if disagree or inconsistent or wrong:
        report.status = Status.disagreement
    else:
        complete = bool(compared) and not undecided and not missing and not report.interrupted
        report.status = Status.agreement if complete else Status.incomplete
    if report.status is Status.agreement and report.pairs:
        everyone = ", ".join(side.name for side in report.sides)
        rounding = " within rounding" if any(side.errors for side in report.sides) else ""
        lines.insert(0, f"All agree{rounding}: {everyone}.")
    report.verdict = lines


def _outcome(pair: Pair) -> str:
    return {True: " agree", False: " disagree", None: ", undecided"}[pair.agrees]


def _errors(side: Side, referee: str | None) -> list[str]:
    """How far a side is from float32, beside how far transformers itself is."""
    lines = []
    for error, what in ((side.error_reading, "reading"), (side.error_generating, "generating")):
        # Reading is told in any case, of the referee itself nothing: it is its own measure.
        if error is None or side.name == referee or (what == "generating" and error.is_rounding):
            continue
        against = "against float32" if what == "reading" else "while generating"
        times = "" if error.ratio is None else f" {error.ratio:.2g} times transformers' own in {error.dtype}:"
        means = f"mean |Δ log p| {error.mean:.2g} and {error.usual:.2g} over {error.tokens} tokens"
        judged = f"rounding ({means})" if error.is_rounding else f"a fault ({means}; {error.allowed:.2g} is allowed)"
        lines.append(f"{side.name}'s error {against} is{times} {judged}.")
    return lines


def _unmeasured(report: Report) -> list[str]:
    """What an agreement in less than float32 is worth without transformers to measure rounding."""
    sides = {side.name: side for side in report.sides}
    pairs = [
        pair for pair in report.pairs if pair.deltas and pair.rounding is None and rounds(sides[pair.a], sides[pair.b])
    ]
    if not pairs:
        return []
    return [
        f"Nothing measured how much rounding there is: a mean |Δ log p| up to {pairs[0].tolerance:.2g} passes for it, "
        "and smaller faults are not seen. Add hf:MODEL as a side, or take --dtype float32."
    ]


def _blame(report: Report, disagree: Sequence[Pair]) -> str:
    """Who stands against the referee, or that nobody can say."""
    referee = report.referee
    with_referee = {
        (pair.b if pair.a == referee else pair.a): pair.agrees for pair in report.pairs if referee and pair.has(referee)
    }
    guilty = [name for name, agrees in with_referee.items() if agrees is False]
    innocent = [name for name, agrees in with_referee.items() if agrees]
    if guilty and innocent:
        verb, agreeing = ("disagrees", "agrees") if len(guilty) == 1 else ("disagree", "agrees")
        return (
            f"{_and(guilty)} {verb} with the referee {referee}, "
            f"{_and(innocent)} {agreeing if len(innocent) == 1 else 'agree'} with it: the fault is in {_and(guilty)}."
        )
    if guilty:
        verb = "disagrees" if len(guilty) == 1 else "disagree"
        return f"{_and(guilty)} {verb} with the referee {referee}, and nobody agrees with it."
    pairs = "; ".join(f"{pair.a} and {pair.b}" for pair in disagree)
    if with_referee:
        return f"These disagree, though each agrees with the referee {referee} within its tolerance: {pairs}."
    return f"These disagree, and without a referee nothing says which is at fault: {pairs}."


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _speed(sides: Sequence[Side]) -> list[str]:
    """At each concurrency, the side with the most tokens a second against each other one."""
    lines = []
    concurrencies = sorted({level.concurrency for side in sides for level in side.levels})
    for concurrency in concurrencies:
        found = [(side.name, level) for side in sides if (level := _level(side, concurrency))]
        found.sort(key=lambda entry: -entry[1].tokens_per_second)
        if len(found) < 2:
            continue
        name, best = found[0]
        others = ", ".join(
            f"{best.tokens_per_second / other.tokens_per_second:.2f} times {rival} ({other.tokens_per_second:.0f})"
            for rival, other in found[1:]
        )
        lines.append(
            f"At concurrency {concurrency}, {name} is the fastest with {best.tokens_per_second:.0f} tokens/s: {others}."
        )
    return lines


def _drafts(sides: Sequence[Side]) -> list[str]:
    """What speculation accepted and, where there is a side without it, what it gained."""
    lines = []
    for side in sides:
        if side.drafts is None:
            continue
        text = f"{side.name} accepts {side.drafts.accepted_length:.2f} tokens a step with its drafts"
        plain = next((other for other in sides if other.without_drafts_of == side.name), None)
        gains = [
            f"{with_drafts.tokens_per_second / without.tokens_per_second:.2f} times as fast as without at concurrency "
            f"{with_drafts.concurrency}"
            for with_drafts in side.levels
            if plain is not None and (without := _level(plain, with_drafts.concurrency))
        ]
        lines.append(f"{'; '.join([text, *gains])}.")
    return lines


def _level(side: Side, concurrency: int) -> Level | None:
    return next((level for level in side.levels if level.concurrency == concurrency), None)
