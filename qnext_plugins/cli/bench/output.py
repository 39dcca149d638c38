"""Files of a benchmark's results, written anew after every result, so that nothing is lost whatever ends the run."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from qnext_plugins.cli.compare.report import Entry


def now() -> str:
    """ISO 8601, with the time zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


class BenchReport(Entry):
    """What every benchmark's report has; a subclass says what its rows are."""

    made_at: str = Field(default_factory=now)
    header: list[str] = Field(default_factory=list)
    """Machine, versions, load, a line each."""
    settings: dict[str, Any] = Field(default_factory=dict)
    problems: list[str] = Field(default_factory=list)
    """What could not be had, a line each."""
    complete: bool = False
    """Whether the run came to its end, with problems or without."""

    def columns(self) -> Sequence[str]:
        """The CSV's."""
        raise NotImplementedError

    def cells(self) -> Iterable[Sequence[Any]]:
        """The CSV's rows; None is an empty cell."""
        raise NotImplementedError

    @property
    def exit_code(self) -> int:
        """0: everything was had; 2: not, or not in full."""
        return 0 if self.complete and not self.problems else 2


class Files:
    """Where a report goes, if anywhere."""

    def __init__(self, json_file: Path | None, csv_file: Path | None) -> None:
        self.json_file, self.csv_file = json_file, csv_file

    def write(self, report: BenchReport) -> None:
        """Replace the files by the report as it is now; what was written before is there until then."""
        if self.json_file is not None:
            _replace(self.json_file, report.model_dump_json(indent=1) + "\n")
        if self.csv_file is not None:
            lines = [f"# {line}\n" for line in report.header]
            part = self.csv_file.with_name(self.csv_file.name + ".part")
            with part.open("w", newline="") as file:
                file.writelines(lines)
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(report.columns())
                writer.writerows([_cell(value) for value in row] for row in report.cells())
            os.replace(part, self.csv_file)


def _cell(value: Any) -> Any:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else value


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
