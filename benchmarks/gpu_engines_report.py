"""What ``gpu_engines.py`` finds, prints and writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field
from rich.console import Console

from qnext_plugins.cli.bench.output import BenchReport
from qnext_plugins.cli.bench.terminal import number, show_header, show_problems, table
from qnext_plugins.cli.compare.report import Entry

COLUMNS = ("op", "shape", "ours_ms", "backend", "peer", "peer_ms", "ratio", "roof_pct")


class Exact(Entry):
    """The answers of one engine, asked in one way, beside transformers."""

    dtype: str
    drafts: int
    how: str
    """``batched``, ``from the cache`` or ``alone``."""
    answers: int
    equal: int
    """Answers of which every token is the one that transformers in float32 takes."""
    gap: float
    """Where the others part: the largest distance, in log-probability, from the token that transformers takes."""
    mean: float
    largest: float
    """|Δ log p| of all tokens from transformers in float32."""
    usual: float | None
    """The mean of transformers itself in the engine's dtype, on the same tokens; None in float32."""
    as_without_drafts: int | None
    """Answers that are those of the engine without drafts; None if there was none."""
    cached: int
    """Tokens of prompts that came from the prefix cache."""
    tokens_a_step: float | None
    """The accepted drafts and one of the model's own; None without drafts."""

    @property
    def is_wrong(self) -> bool:
        return self.dtype == "float32" and self.equal < self.answers

    def in_words(self) -> str:
        """A line of the CSV's header."""
        drafts = f" with {self.drafts} drafts" if self.drafts else ""
        steps = "" if self.tokens_a_step is None else f", {self.tokens_a_step:.2f} tokens a step"
        same = "" if self.as_without_drafts is None else f", {self.as_without_drafts} are those without drafts"
        usual = "" if self.usual is None else f" (transformers' own: {self.usual:.2g} on average)"
        gap = f", others part within {self.gap:.2g}" if self.equal < self.answers else ""
        return (
            f"exact: {self.dtype}{drafts}, {self.how}: {self.equal} of {self.answers} answers are those of "
            f"transformers in float32{gap}{same}; |Δ log p| {self.mean:.2g} on average, {self.largest:.2g} at most"
            f"{usual}; {self.cached} tokens from the cache{steps}"
        )


class Speed(Entry):
    """What one shape took in the engine with the plugin and in the engine with its own model; times in ms."""

    op: str
    shape: str
    ours_ms: float
    backend: str
    """Of our kernels."""
    peer: str
    peer_ms: float | None
    """None where the engine's own model does not start."""
    roof_percent: float
    roof: str
    tokens: int
    """Whose time this is."""

    @property
    def ratio(self) -> float | None:
        return None if self.peer_ms is None else self.peer_ms / self.ours_ms


class EnginesReport(BenchReport):
    """All that was found."""

    exact: list[Exact] = Field(default_factory=list)
    speed: list[Speed] = Field(default_factory=list)
    disagreements: list[str] = Field(default_factory=list)
    """Those of the problems where results are wrong."""

    def columns(self) -> Sequence[str]:
        return COLUMNS

    def cells(self) -> Iterator[Sequence[Any]]:
        for row in self.speed:
            times = (row.ours_ms, row.backend, row.peer, row.peer_ms, row.ratio)
            yield (row.op, row.shape, *times, row.roof_percent)

    def disagree(self, line: str) -> None:
        """Note a problem that is a wrong result."""
        self.problems.append(line)
        self.disagreements.append(line)

    @property
    def exit_code(self) -> int:
        """1 where results are wrong."""
        return 1 if self.disagreements else super().exit_code


def show(report: EnginesReport, console: Console) -> None:
    """Machine and versions, both tables, problems."""
    show_header(report, console)
    if report.exact:
        numbers = ("equal", "largest gap", "as without drafts", "mean |Δ log p|", "at most", "transformers' own mean")
        answers = table(
            "Answers beside transformers in float32",
            ("dtype", "drafts", "asked"),
            (*numbers, "cached", "tokens a step"),
        )
        for answered in report.exact:
            answers.add_row(
                answered.dtype,
                str(answered.drafts),
                answered.how,
                f"{answered.equal} of {answered.answers}",
                number(answered.gap, 2),
                "–" if answered.as_without_drafts is None else str(answered.as_without_drafts),
                *(number(value, 2) for value in (answered.mean, answered.largest, answered.usual)),
                str(answered.cached),
                number(answered.tokens_a_step, 3),
            )
        console.print(answers)
    if report.speed:
        columns = ("ours, ms", "own, ms", "ratio", "% of roof", "ours, tokens/s")
        times = table("An engine with the plugin and with its own model", ("op", "shape", "backend", "peer"), columns)
        for timed in report.speed:
            values = (number(timed.ours_ms), number(timed.peer_ms), number(timed.ratio, 3))
            percent = f"{timed.roof_percent:.0f} {timed.roof}"
            speed = f"{1e3 * timed.tokens / timed.ours_ms:.0f}"
            times.add_row(timed.op, timed.shape, timed.backend, timed.peer, *values, percent, speed)
        console.print(times)
    show_problems(report, console)
