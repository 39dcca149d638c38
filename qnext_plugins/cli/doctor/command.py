"""The command line of ``qnext doctor``."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import qnext_plugins
from qnext_plugins.cli.doctor import checkpoint_checks, environment, kernels, machine
from qnext_plugins.cli.doctor.findings import CheckResult, Status, Subject, failure, one_line, run_checks
from qnext_plugins.cli.doctor.kernels import SERVES_TOO
from qnext_plugins.cli.doctor.report import Report

COLOURS = {Status.OK: "green", Status.NOTE: "cyan", Status.WARNING: "yellow", Status.FAILURE: "red"}
Section = TypeVar("Section")


def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="Check this checkpoint too: a folder, or a name (looked up in the Hugging Face cache)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, with stable keys.")] = False,
) -> None:
    """Check this environment: engines, plugin, kernels, threads, and what is known to go wrong, each with its fix.

    Compiles the C++ kernels if that has not happened yet, as the first start of an engine would. The exit status is 1
    if something would not work, 2 for a wrong argument, else 0.
    """
    try:
        subject = checkpoint_checks.subject_of(model)
    except ValueError as error:
        typer.echo(f"qnext doctor: {error}", err=True)
        raise typer.Exit(2) from None
    errors = Console(stderr=True)
    with errors.status("looking …") if errors.is_terminal else contextlib.nullcontext(), quiet_engines():
        report = examine(subject)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        show(report, Console())
    raise typer.Exit(0 if report.healthy else 1)


@contextlib.contextmanager
def quiet_engines() -> Iterator[None]:
    """Keep what engines log, print and warn of while they are imported out of the report."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def examine(subject: Subject) -> Report:
    """Make every section and run every check; nothing that raises ends it."""
    checks: list[CheckResult] = []

    def section(name: str, make: Callable[[], Section]) -> Section | None:
        try:
            return make()
        except Exception as error:
            fix = "see the message; the section is left out"
            checks.append(CheckResult(name=name, **failure(one_line(error), fix).model_dump()))
            return None

    doctors = section("environment.doctors", environment.doctors) or []
    # Without them nothing that computes can be imported, and everything would say the same.
    valid = environment.settings(subject).status != Status.FAILURE
    report = Report(
        qnext_plugins=qnext_plugins.__version__,
        machine=section("machine.machine", machine.machine),
        threads=section("machine.threads", machine.threads),
        library=section("kernels.library", kernels.library) if valid else None,
        backends=(section("kernels.backends", kernels.backends) if valid else None) or [],
        engines=[environment.engine(doctor) for doctor in doctors],
        variables=environment.variables(),
        model=subject.model,
        checks=[],
    )
    checks += run_checks("environment", environment.CHECKS, subject)
    checks += run_checks("machine", (machine.thread_count,), subject)
    if valid:
        checks += run_checks("kernels", kernels.CHECKS, subject)
        checks += run_checks("checkpoint", checkpoint_checks.CHECKS, subject)
        for engine in doctors:
            if environment.installed_version(engine) is not None:
                own = (environment.version_check(engine), environment.entry_point_check(engine), *engine.checks)
                checks += run_checks(engine.name, own, subject)
    report.checks = checks
    return report


def show(report: Report, console: Console) -> None:
    """Print the report as tables, the checks last."""
    _show_facts(report, console)
    if report.backends:
        _show_backends(report, console)
    table = Table(title="Checks", title_justify="left", show_lines=False)
    for heading in ("", "check", "finding"):
        table.add_column(heading, overflow="fold")
    for check in report.checks:
        text = escape(check.message) + (f"\n[bold]→ {escape(check.fix)}[/bold]" if check.fix else "")
        table.add_row(f"[{COLOURS[check.status]}]{check.status}[/]", check.name, text)
    console.print(table)
    counts = {status: sum(check.status == status for check in report.checks) for status in reversed(Status)}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count))


def _show_facts(report: Report, console: Console) -> None:
    table = Table(title=f"qnext-plugins {report.qnext_plugins}", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    if (here := report.machine) is not None:
        gib = 1 << 30
        table.add_row("Python", f"{here.python} ({here.executable})")
        table.add_row("system", f"{here.system}")
        table.add_row("torch", f"{here.torch} on {here.device}")
        table.add_row("device", f"{here.device_name}; {', '.join(here.instruction_sets)}")
        memory = (here.memory_available_bytes / gib, here.memory_bytes / gib)
        table.add_row("memory", f"{memory[0]:.1f} of {memory[1]:.1f} GiB available")
    if (threads := report.threads) is not None:
        quota = "" if threads.cpu_quota is None else f", {threads.cpu_quota:g} cores' worth of time"
        table.add_row("threads", f"{threads.torch_threads} on cores {','.join(map(str, threads.cores))}{quota}")
        for name, value in threads.variables.items():
            table.add_row(name, escape(value))
    if (library := report.library) is not None:
        table.add_row("C++ compiler", library.compiler or "none")
        table.add_row("kernels", library.path or f"none: {escape(str(library.reason))}")
    for engine in report.engines:
        tested = "" if engine.version is None else " (tested)" if engine.tested else " (not tested)"
        table.add_row(engine.name, f"{engine.version or 'not installed'}{tested}")
    for name, value in report.variables.items():
        table.add_row(name, escape(value))
    console.print(table)


def _show_backends(report: Report, console: Console) -> None:
    dtypes = list(dict.fromkeys(row.dtype for row in report.backends))
    table = Table(title="Kernels", title_justify="left")
    for heading in ("operation", *dtypes, "the others"):
        table.add_column(heading, overflow="fold")
    for operation in dict.fromkeys(row.operation for row in report.backends):
        rows = {row.dtype: row for row in report.backends if row.operation == operation}
        others = [other for row in rows.values() for other in row.others.items()]
        able = dict.fromkeys(name for name, reason in others if reason == SERVES_TOO)
        reasons = dict.fromkeys(f"{name}: {reason}" for name, reason in others if reason != SERVES_TOO)
        serving = [rows[dtype].backend or "[red]none[/]" for dtype in dtypes]
        table.add_row(operation, *serving, escape("; ".join([*([f"{', '.join(able)} too"] if able else []), *reasons])))
    console.print(table)
