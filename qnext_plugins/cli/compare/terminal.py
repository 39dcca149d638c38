"""The report on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qnext_plugins.cli.compare.report import Error, Kind, Pair, Report, Side, Status, Times

COLOURS = {Status.agreement: "green", Status.disagreement: "red", Status.incomplete: "yellow"}
STYLES = {Kind.tie: "green", Kind.rounding: "green", Kind.fault: "red", Kind.unknown: "yellow"}
MOST_PARTINGS = 8


def show(report: Report, console: Console) -> None:
    """Print the sides, the pairs, the partings, performance and the verdict."""
    console.print(_sides(report.sides))
    if report.pairs:
        console.print(_pairs(report.pairs))
    for pair in report.pairs:
        if pair.partings:
            console.print(_partings(pair))
    if any(side.levels for side in report.sides):
        console.print(_performance(report.sides))
    for side in report.sides:
        for kind, lines in (("problem", side.problems), ("note", side.notes)):
            for line in lines:
                console.print(f"{escape(side.name)}, {kind}: {escape(line)}", soft_wrap=True)
    colour = COLOURS[report.status]
    console.print(f"\n[bold {colour}]{report.status.capitalize()}[/bold {colour}]")
    for line in report.verdict:
        console.print(f"- {escape(line)}", soft_wrap=True)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value * 1000:.1f}"


def _times(times: Times | None) -> str:
    return f"{milliseconds(times.p50)} / {milliseconds(times.p95)}" if times else "–"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def shown_versions(side: Side) -> dict[str, str]:
    """Versions of what a side runs on, not of all that lies in its environment."""
    engines = {"vllm": ("vllm",), "sglang": ("sglang",), "hf": ("transformers",), "openai": ()}[side.kind]
    plugin = ("qnext-plugins",) if side.served_by else ()
    return {name: side.versions[name] for name in (*engines, "torch", *plugin) if name in side.versions}


def _sides(sides: list[Side]) -> Table:
    measured = any(side.errors for side in sides)
    errors = ["error: reading", "generating"] if measured else []
    table = _table("Sides", "side", "what", "versions", "dtype", "answered", "noise: mean, p99", *errors)
    for side in sides:
        what = f"{side.kind} {side.model or side.spec}"
        versions = ", ".join(f"{name} {version}" for name, version in shown_versions(side).items())
        noise = f"{number(side.noise.mean)}, {number(side.noise.p99)}" if side.noise else "–"
        row = (side.name, what, versions, side.dtype or "unknown", str(len(side.answers)), noise)
        told = [error_in_words(each) for each in (side.error_reading, side.error_generating)] if measured else []
        table.add_row(*map(escape, (*row, *told)))
    return table


def error_in_words(error: Error | None) -> str:
    """The error and how many times that of transformers it is."""
    if error is None:
        return "–"
    return number(error.mean) + (f" ({error.ratio:.2g}×)" if error.ratio is not None else "")


def _pairs(pairs: list[Pair]) -> Table:
    kinds = kinds_of(pairs)
    columns = ("pair", "", "identical", *map(heading, kinds), "mean |Δ log p|", "largest", "a tie up to")
    table = _table("Agreement", *columns, *(["rounding up to"] if Kind.rounding in kinds else []))
    colours = {True: "green", False: "red", None: "yellow"}
    for pair in pairs:
        table.add_row(
            escape(f"{pair.a} – {pair.b}"),
            f"[{colours[pair.agrees]}]{pair.word}[/]",
            f"{pair.identical} of {pair.prompts}",
            *(str(len(pair.partings_of(kind))) for kind in kinds),
            number(pair.deltas.mean if pair.deltas else None),
            number(pair.deltas.largest if pair.deltas else None),
            number(pair.margin),
            *([number(pair.rounding)] if Kind.rounding in kinds else []),
        )
    return table


def kinds_of(pairs: Sequence[Pair]) -> list[Kind]:
    """The kinds of partings to count: ties and faults always, the others where there are any."""
    found = {parting.kind for pair in pairs for parting in pair.partings}
    return [kind for kind in Kind if kind in found or kind in (Kind.tie, Kind.fault)]


def heading(kind: Kind) -> str:
    """A column of partings of this kind."""
    return {Kind.tie: "ties", Kind.fault: "faults"}.get(kind, str(kind))


def _partings(pair: Pair) -> Table:
    a, b = escape(pair.a), escape(pair.b)
    columns = ("prompt", "at", "after", a, b, f"gap in {a}", f"gap in {b}", "")
    table = _table(f"Where {a} and {b} part", *columns)
    for parting in pair.partings[:MOST_PARTINGS]:
        style = STYLES[parting.kind]
        table.add_row(
            str(parting.prompt),
            str(parting.position),
            escape(repr(parting.common[-24:])),
            escape(repr(parting.a)),
            escape(repr(parting.b)),
            number(parting.a_gap),
            number(parting.b_gap),
            f"[{style}]{parting.kind}[/{style}]",
        )
    if (left := len(pair.partings) - MOST_PARTINGS) > 0:
        table.caption = f"and {left} more"
    return table


def _performance(sides: list[Side]) -> Table:
    table = _table(
        "Performance (p50 / p95)",
        "side",
        "at a time",
        "tokens/s",
        "first token, ms",
        "between tokens, ms",
        "tokens a step with drafts",
    )
    for side in sides:
        for level in side.levels:
            table.add_row(
                escape(side.name),
                str(level.concurrency),
                f"{level.tokens_per_second:.1f}",
                _times(level.first_token),
                _times(level.inter_token),
                f"{side.drafts.accepted_length:.2f}" if side.drafts else "–",
            )
    return table
