"""The reports on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qnext_plugins.cli.bench.headline import HeadlineReport
from qnext_plugins.cli.bench.kernels import KernelsReport
from qnext_plugins.cli.bench.output import BenchReport
from qnext_plugins.cli.bench.serve import ServeReport
from qnext_plugins.cli.bench.tools import Times


def number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def table(title: str, words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    """An empty table; the columns of words come first."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for column in words:
        made.add_column(column, overflow="fold")
    for column in numbers:
        made.add_column(column, justify="right")
    return made


def show_header(report: BenchReport, console: Console) -> None:
    for line in report.header:
        console.print(line, markup=False, soft_wrap=True)


def show_problems(report: BenchReport, console: Console) -> None:
    for line in report.problems:
        console.print(f"[yellow]problem:[/yellow] {escape(line)}", soft_wrap=True)


def show_absent(report: KernelsReport, console: Console) -> None:
    """The peers that are not here and what was left out, a line each."""
    for library, reason in report.absent.items():
        console.print(f"no peer {library}: {escape(reason)}", soft_wrap=True)
    for line in report.notes:
        console.print(f"note: {line}", markup=False, soft_wrap=True)


def show_kernels(report: KernelsReport, console: Console) -> None:
    """Machine, backends with their reasons, times."""
    show_header(report, console)
    backends = table(f"Backends on {report.device}, bfloat16", ("operation", "serve, fastest first", "decline"), ())
    for operation, reasons in report.backends.items():
        serve = [name for name, reason in reasons.items() if reason is None]
        decline = [f"{name}: {reason.splitlines()[0]}" for name, reason in reasons.items() if reason is not None]
        backends.add_row(operation, ", ".join(serve), escape("\n".join(decline)))
    console.print(backends)
    show_absent(report, console)
    graphs = any(row.one_by_one_ms is not None for row in report.rows)
    peers = [f"× {library} {version}" for library, version in report.libraries.items()]
    times = table(
        "Kernels (×: another's time over ours)",
        ("operation", "shape", "backend"),
        ("threads", "ms", *(["ms, one by one"] if graphs else []), "× reference", *peers, "% of roof"),
    )
    for row in report.rows:
        ratios = {peer.library: f"{peer.ratio:.2f}" for peer in row.peers}
        percent = "–" if row.roof_percent is None else f"{row.roof_percent:.0f} {row.roof}"
        times.add_row(
            row.op,
            row.shape,
            f"[bold]{row.backend}[/bold]" if row.selected else row.backend,
            str(row.threads),
            number(row.ms),
            *([number(row.one_by_one_ms)] if graphs else []),
            number(row.reference_ratio, 3),
            *(ratios.get(library, "–") for library in report.libraries),
            percent,
        )
    console.print(times)
    show_problems(report, console)


def show_serve(report: ServeReport, console: Console) -> None:
    """What was measured by what, and the levels."""
    if report.model is not None:
        console.print(f"{report.kind} serves {report.model}; measured by {report.tool}", markup=False, soft_wrap=True)
    if report.served_by is not None:
        console.print(report.served_by, markup=False, soft_wrap=True)
    if report.levels:
        columns = ("at a time", "requests", "failed", "tokens/s", "first token, ms", "between pieces, ms")
        levels = table(
            f"Load of {report.settings['input_tokens']} tokens in, {report.settings['output_tokens']} out (p50 / p99)",
            (),
            (*columns, "a token, ms", "tokens a step with drafts"),
        )
        for level in report.levels:
            levels.add_row(
                str(level.concurrency),
                str(level.requests),
                str(level.failed),
                f"{level.output_tokens_per_second:.1f}",
                _quantiles(level.first_token),
                _quantiles(level.inter_token),
                _quantiles(level.time_per_token),
                "–" if level.accepted_length is None else f"{level.accepted_length:.2f}",
            )
        console.print(levels)
    show_problems(report, console)


def _quantiles(times: Times) -> str:
    return f"{times.p50:.1f} / {times.p99:.1f}"


def show_headline(report: HeadlineReport, console: Console) -> None:
    """Machine, what served, and the ratios."""
    show_header(report, console)
    for model, architecture in report.served_by.items():
        console.print(f"{model} is served by {architecture}", markup=False, soft_wrap=True)
    if report.rows:
        models = (report.rows[0].next.model, report.rows[0].dense.model)
        ratios = table(
            "Tokens a second at full depth, from slices",
            ("phase",),
            ("context", "at a time", *models, "ratio", "the release", "by FLOP or bytes alone"),
        )
        for row in report.rows:
            speeds = (number(side.tokens_per_second, 3) for side in (row.next, row.dense))
            claim = "–" if row.claim is None else row.claim
            ratio, predicted = f"[bold]{row.ratio:.1f}[/bold]", f"{row.predicted:.1f}"
            ratios.add_row(row.phase, str(row.context), str(row.batch), *speeds, ratio, claim, predicted)
        console.print(ratios)
    show_problems(report, console)
