"""The plots of the page, as SVG."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from qnext_plugins.cli.compare.analysis import joined, own_differences, pair_differences, units
from qnext_plugins.cli.compare.report import Kind, Level, Pair, Report, Side, Times
from qnext_plugins.cli.compare.rounding import Measured, by_key, differences
from qnext_plugins.cli.compare.terminal import kinds_of

# Okabe and Ito's colours, which most people can tell apart.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
ABSENT, SAME, AFTER, TIE, ROUNDING, FAULT, UNKNOWN = range(7)
CELLS = ("#ffffff", "#b7dfc4", "#e3e3e3", "#e69f00", "#d9c64a", "#c0143c", "#8d6cab")
PARTED = {Kind.tie: TIE, Kind.rounding: ROUNDING, Kind.fault: FAULT, Kind.unknown: UNKNOWN}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qnext-compare",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
SMALLEST = 1e-9
"""Where a difference of zero is drawn on a logarithmic axis."""


def colour_of(report: Report, name: str) -> str:
    """The colour of a side, the same in every plot."""
    names = [side.name for side in report.sides]
    return COLOURS[names.index(name) % len(COLOURS)]


def agreement_map(report: Report, pair: Pair) -> str:
    """A row a prompt, a column a token: the same, the kind of a parting, and what comes after it."""
    answers = [
        {answer.prompt: answer for answer in side.answers}
        for name in (pair.a, pair.b)
        for side in report.sides
        if side.name == name
    ]
    shared = sorted(answers[0].keys() & answers[1].keys())
    lengths = {n: min(len(units(side[n], pair.unit)) for side in answers) for n in shared}
    cells = np.full((len(shared), max(lengths.values(), default=1)), ABSENT)
    partings = {parting.prompt: parting for parting in pair.partings}
    for row, number in enumerate(shared):
        cells[row, : lengths[number]] = FAULT if number in pair.other_prompts else SAME
        if parting := partings.get(number):
            cells[row, parting.position : lengths[number]] = AFTER
            cells[row, parting.position] = PARTED[parting.kind]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 1.1 + 0.09 * len(shared)), layout="constrained")
        axes = figure.subplots()
        axes.imshow(cells, aspect="auto", cmap=ListedColormap(CELLS), vmin=0, vmax=len(CELLS) - 1, interpolation="none")
        axes.set_xlabel(pair.unit.removesuffix("s"))
        axes.set_ylabel("prompt")
        every = max(1, len(shared) // 6)
        axes.set_yticks(range(0, len(shared), every), [str(number) for number in shared[::every]])
        shown = {"same": SAME} | {str(kind): PARTED[kind] for kind in kinds_of([pair])} | {"after a parting": AFTER}
        handles = [Patch(color=CELLS[cell], label=label) for label, cell in shown.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(shown), frameon=False)
        return _svg(figure, f"map-{pair.a}-{pair.b}")


def delta_curves(report: Report) -> str | None:
    """The share of tokens whose |Δ log p| is above x: of each pair, of each side from float32, and from itself."""
    by_name = {side.name: side for side in report.sides}
    measured = Measured.by(by_name.get(report.referee or ""))
    curves = [
        (
            f"{pair.a} – {pair.b}",
            joined(pair_differences(by_name[pair.a], by_name[pair.b])),
            COLOURS[n % len(COLOURS)],
            "-",
        )
        for n, pair in enumerate(report.pairs)
    ]
    curves += [
        (
            f"{side.name} – float32",
            joined(differences(by_key(side.scores), measured.exact)),
            colour_of(report, side.name),
            "--",
        )
        for side in report.sides
        if side.error_reading is not None
    ]
    curves += [
        (f"{side.name}, generated – read", own_differences(side), colour_of(report, side.name), ":")
        for side in report.sides
    ]
    curves = [curve for curve in curves if len(curve[1])]
    if not curves:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        axes = figure.subplots()
        for label, values, colour, line in curves:
            ordered = np.maximum(np.sort(values), SMALLEST)
            share = 1 - np.arange(len(ordered)) / len(ordered)
            axes.step(ordered, share, line, where="pre", label=label, color=colour, linewidth=1.6)
        allowed = {side.error_reading.allowed for side in report.sides if side.error_reading is not None}
        for tolerance in sorted(allowed or {pair.tolerance for pair in report.pairs if pair.deltas}):
            axes.axvline(tolerance, color="#888888", linewidth=1)
            axes.annotate(
                f" allowed mean {tolerance:.2g}", (tolerance, 1), va="bottom", color="#555555", annotation_clip=False
            )
        axes.set(xscale="log", yscale="log", xlabel="|Δ log p| of a token", ylabel="share of tokens above")
        axes.grid(color="#e8e8e8")
        figure.legend(loc="outside right center", frameon=False)
        return _svg(figure, "deltas")


def performance(report: Report) -> str | None:
    """Throughput, time to the first token and time between tokens at each concurrency."""
    sides = [side for side in report.sides if side.levels]
    if not sides:
        return None
    concurrencies = sorted({level.concurrency for side in sides for level in side.levels})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.1), layout="constrained")
        panels = figure.subplots(1, 3)
        _bars(panels[0], report, sides, concurrencies, "tokens/s", _throughput)
        _bars(panels[1], report, sides, concurrencies, "first token, ms (p50, line to p95)", _first_token)
        _bars(panels[2], report, sides, concurrencies, "between tokens, ms (p50, line to p95)", _inter_token)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(sides), frameon=False)
        return _svg(figure, "performance")


def _throughput(level: Level) -> tuple[float, float | None]:
    return level.tokens_per_second, None


def _first_token(level: Level) -> tuple[float, float | None]:
    return _in_milliseconds(level.first_token)


def _inter_token(level: Level) -> tuple[float, float | None]:
    return _in_milliseconds(level.inter_token) if level.inter_token else (0.0, None)


def _in_milliseconds(times: Times) -> tuple[float, float]:
    return times.p50 * 1000, times.p95 * 1000


def _bars(
    axes: Axes,
    report: Report,
    sides: Sequence[Side],
    concurrencies: Sequence[int],
    title: str,
    value: Callable[[Level], tuple[float, float | None]],
) -> None:
    """A bar a side and concurrency; ``value`` gives its height and, or None, the end of a thin line."""
    width = 0.8 / len(sides)
    for n, side in enumerate(sides):
        levels = {level.concurrency: value(level) for level in side.levels}
        places = [at + (n - (len(sides) - 1) / 2) * width for at, c in enumerate(concurrencies) if c in levels]
        heights = [levels[c][0] for c in concurrencies if c in levels]
        axes.bar(places, heights, 0.92 * width, color=colour_of(report, side.name), label=side.name)
        ends = [(at, *levels[c]) for at, c in zip(places, (c for c in concurrencies if c in levels), strict=True)]
        for at, low, high in ends:
            if high is not None:
                axes.plot([at, at], [low, high], color="#333333", linewidth=1)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xticks(range(len(concurrencies)), [f"{c} at a time" for c in concurrencies])
    axes.grid(axis="y", color="#e8e8e8")


def _svg(figure: Figure, name: str) -> str:
    """The figure as an svg element whose inner names no other plot of the page has."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    prefix = re.sub(r"\W+", "-", name)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="|url\()#', rf"\g<1>#{prefix}-", text)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))
