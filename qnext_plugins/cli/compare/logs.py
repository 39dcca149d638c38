"""Finds in the log of a program why it ended."""

from __future__ import annotations

import re

LONGEST = 400
PREFIX = re.compile(
    # vLLM: (EngineCore pid=12) ERROR 11-26 07:54:13 [core.py:1510], SGLang: [2026-11-26 07:54:13 TP0]
    r"^(?P<writer>\(\S+ pid=\d+\) ?)?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]+\] ?|\[\d{4}-\d\d-\d\d [^\]]+\] ?)?"
)
TRACEBACK = re.compile(r"Traceback \(most recent call last\):")
EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*(?P<name>[A-Z]\w*)(?:: (?P<message>.*))?$")
ERROR = re.compile(r"(?:\b\w*(?:Error|Exception)|\berror): \S.*")
PYDANTIC = re.compile(r" \[type=\w+, input_value=.*?\](?= |$)")
# What only says that another process or another exception has the reason.
POINTER = re.compile(
    r"root cause|stack trace above|exception in a background process|died (?:during|unexpectedly)|child process"
    r"|Initialization failed\. Please see the error messages above",
    re.IGNORECASE,
)
CONSEQUENCES = (
    "BrokenPipeError",
    "CancelledError",
    "ConnectionResetError",
    "EOFError",
    "KeyboardInterrupt",
    "SystemExit",
)


def root_cause(log: str) -> str:
    """The exception that a log ends with, in one line, without those that point to it or follow from it.

    Engines have several processes, and the one that fails is not the one that ends last. Where there is no traceback,
    it is the last line that names an error, or else the last line.
    """
    exceptions = _exceptions(log)
    causes = [line for name, line in exceptions if not POINTER.search(line) and name not in CONSEQUENCES]
    if causes:
        return _shortened(causes[-1])
    lines = [PREFIX.sub("", line).strip() for line in log.splitlines()]
    lines = [line for line in lines if line]
    errors = [found[0] for line in lines if not POINTER.search(line) and (found := ERROR.search(line))]
    return _shortened((errors or [line for _, line in exceptions] or lines or ["it printed nothing"])[-1])


def _shortened(line: str) -> str:
    line = PYDANTIC.sub("", line)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def _goes_on(told: str, text: str) -> bool:
    """Whether a message is about to list what follows it."""
    return told.rstrip().endswith(":") and bool(text.strip())


def _exceptions(log: str) -> list[tuple[str, str]]:
    """Name and line of every exception that ends a traceback, in the log's order.

    The tracebacks of several processes may be interleaved: each writer, known by the prefix of its lines, has its own.
    """
    found: list[tuple[str, str]] = []
    inside: dict[str, bool] = {}
    open_at: dict[str, int] = {}
    for line in log.splitlines():
        prefix = PREFIX.match(line)
        text = line[prefix.end() :] if prefix else line
        writer = (prefix and prefix["writer"]) or ""
        if TRACEBACK.search(text):
            inside[writer] = True
            open_at.pop(writer, None)
        elif text.startswith((" ", "\t")) or (writer in open_at and _goes_on(found[open_at[writer]][1], text)):
            # What follows an exception indented belongs to its message: so pydantic writes it.
            if writer in open_at and "further information" not in text:
                name, told = found[open_at[writer]]
                found[open_at[writer]] = (name, f"{told.rstrip()} {text.strip()}")
        elif inside.get(writer) and (exception := EXCEPTION.match(text)):
            inside[writer] = False
            open_at[writer] = len(found)
            message = exception["message"]
            found.append((exception["name"], f"{exception['name']}: {message}" if message else exception["name"]))
        else:
            open_at.pop(writer, None)
    return found
