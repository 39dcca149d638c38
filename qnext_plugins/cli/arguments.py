"""What several subcommands take from the command line, and how they end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERRUPTED = 130
TERMINATED = 143


class ArgumentError(ValueError):
    """One line about an argument: its name, what was expected, what came."""


def positive_numbers(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers with commas, such as 1,4; raises ArgumentError."""
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ArgumentError(f"{name}: expected positive numbers with commas, such as 1,4, got {text!r}")
    return numbers


def check_writable(name: str, file: Path | None) -> None:
    """Raise ArgumentError before the work is done rather than after."""
    if file is not None and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
        raise ArgumentError(f"{name}: expected a file in a folder that can be written to, got {file}")


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """So that `kill` too ends the servers that were started."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
