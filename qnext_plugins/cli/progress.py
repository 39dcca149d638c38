"""Live progress: a bar on a terminal, a line a phase elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class Step:
    """Counts a step of a task when it is called."""

    def __init__(self, bars: Bars, task: TaskID, refresh_alone: bool) -> None:
        self._bars, self._task, self._refresh = bars, task, not refresh_alone

    def __call__(self) -> None:
        self._bars.update(self._task, advance=1, refresh=self._refresh)

    def say(self, text: str) -> None:
        """Name what is being done now."""
        self._bars.update(self._task, description=escape(text), refresh=self._refresh)


class Progress:
    """Says on stderr what is being done."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, line: str) -> None:
        self.console.print(escape(line), style="dim", soft_wrap=True)

    @contextmanager
    def task(self, name: str, total: int, *, refresh_alone: bool = True) -> Iterator[Step]:
        """Show a task of ``total`` steps; what is yielded counts one.

        ``refresh_alone``: whether a thread redraws the bar; it would take time from what is measured in this process.
        """
        start = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bars = Bars(
            *columns,
            console=self.console,
            transient=True,
            auto_refresh=refresh_alone,
            disable=not self.console.is_terminal,
        )
        with bars:
            task = bars.add_task(escape(name), total=total)
            yield Step(bars, task, refresh_alone)
        done = int(bars.tasks[task].completed)
        count = str(total) if done == total else f"{done} of {total}"
        self.say(f"{name}: {count} in {time.monotonic() - start:.1f} s")
