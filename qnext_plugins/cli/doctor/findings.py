"""What a check is and what it says."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel


class Status(enum.StrEnum):
    """From harmless to harmful; only a failure makes the exit status 1."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    FAILURE = "failure"


class Finding(BaseModel):
    """What a check found, in one sentence, and how to mend it."""

    status: Status
    message: str
    fix: str | None = None


class CheckResult(Finding):
    """A finding under the stable name of its check, ``area.check``."""

    name: str


@dataclass(frozen=True)
class Subject:
    """What the checks look at, beside the environment."""

    model: str | None = None
    """As the user named it."""
    folder: Path | None = None
    """Of the checkpoint, where it is on this machine."""
    config: dict[str, Any] | None = field(default=None, repr=False)
    """The checkpoint's config.json."""


Check = Callable[[Subject], Finding | None]
"""None: it does not apply here. It may raise, which is reported."""


@dataclass(frozen=True)
class EngineDoctor:
    """What an engine's package tells the doctor; importing it must not import the engine."""

    name: str
    distributions: tuple[str, ...]
    """Names that the engine is installed under."""
    supported: str
    """Version specifier that the plugin accepts."""
    tested: tuple[str, ...]
    """Versions that the tests run with."""
    entry_points: tuple[str, ...]
    """Groups that must hold our ``qnext``."""
    checks: tuple[Check, ...]


def ok(message: str) -> Finding:
    return Finding(status=Status.OK, message=message)


def note(message: str, fix: str | None = None) -> Finding:
    return Finding(status=Status.NOTE, message=message, fix=fix)


def warning(message: str, fix: str) -> Finding:
    return Finding(status=Status.WARNING, message=message, fix=fix)


def failure(message: str, fix: str) -> Finding:
    return Finding(status=Status.FAILURE, message=message, fix=fix)


def run_checks(area: str, checks: Iterable[Check], subject: Subject) -> list[CheckResult]:
    """Run the checks that apply; one that raises becomes a failure that says so."""
    results = []
    for check in checks:
        try:
            finding = check(subject)
        # SGLang's side ends the process with SystemExit where QNEXT_STRICT forbids to step back.
        except (Exception, SystemExit) as error:
            finding = failure(f"the check ended with {one_line(error)}", "read the message; nothing else was concluded")
        if finding is not None:
            name = f"{area}.{getattr(check, '__name__', repr(check))}"
            results.append(CheckResult(name=name, **finding.model_dump()))
    return results


def one_line(error: BaseException) -> str:
    """An exception's type and message without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())
