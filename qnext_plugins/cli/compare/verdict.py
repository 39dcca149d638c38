"""Puts what was found in words."""

from __future__ import annotations

from collections.abc import Sequence

from qnext_plugins.cli.compare.report import Level, Pair, Report, Side, Status


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
    compared = [pair for pair in report.pairs if pair.agrees is not None]
    disagree = [pair for pair in compared if not pair.agrees]
    missing = [f"{side.name}: {problem}" for side in report.sides for problem in side.problems]
    missing += [f"{pair.a} and {pair.b} could not be compared." for pair in report.pairs if pair.agrees is None]
    lines = [_blame(report, disagree)] if disagree else []
    lines += [
        f"{side.name} contradicts itself: reading its own tokens changes their log-probability by "
        f"{side.noise.mean:.2g} on average, so what it generates is not what it computes."
        for side in inconsistent
        if side.noise is not None
    ]
    lines += [
        f"{pair.a} and {pair.b} {'agree' if pair.agrees else 'disagree'}: {'; '.join(pair.reasons)}."
        for pair in compared
    ]
    lines += _speed(report.sides) + _drafts(report.sides)
    if missing:
        lines.append(f"Not everything could be done: {len(missing)} problems, the first: {missing[0]}")
    if report.interrupted:
        lines.append("The comparison was interrupted; this is what there was by then.")
    if disagree or inconsistent:
        report.status = Status.disagreement
    else:
        complete = bool(compared) and not missing and not report.interrupted
        report.status = Status.agreement if complete else Status.incomplete
    if report.status is Status.agreement and report.pairs:
        everyone = ", ".join(side.name for side in report.sides)
        lines.insert(0, f"All agree: {everyone}.")
    report.verdict = lines


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
