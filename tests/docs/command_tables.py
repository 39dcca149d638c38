"""The tables of arguments and options in ``docs/command-line.md``, made from the commands themselves.

`python -m tests.docs.command_tables` writes them into the page; a test says when that is due.
"""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path
from typing import Any

import typer

from qnext_plugins.cli.app import COMMANDS

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
BLOCK = "<!-- options of {name} -->\n\n{table}\n<!-- end -->"
BLOCKS = re.compile(r"<!-- options of (?P<name>[\w ]+) -->\n.*?<!-- end -->", re.S)


def commands() -> dict[str, Any]:
    """Every command as the command line has it, by what is typed behind ``qnext``."""
    found: dict[str, Any] = {}
    for name, (target, _) in COMMANDS.items():
        function = pkgutil.resolve_name(target)
        if isinstance(function, typer.Typer):
            group: Any = typer.main.get_command(function)
            found |= {f"{name} {own}": command for own, command in group.commands.items()}
        else:
            app = typer.Typer(add_completion=False)
            app.command(name)(function)
            found[name] = typer.main.get_command(app)
    return found


def written(parameter: Any) -> str:
    """How a parameter is given: its names, and "…" where a value goes behind them."""
    if not parameter.opts[0].startswith("-"):
        return f"`{parameter.metavar or parameter.name.upper()}`"
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return names if parameter.is_flag else f"{names} …"


def default(parameter: Any) -> str:
    """The value that it has if it is not given, where the help does not say it."""
    value = getattr(parameter.default, "value", parameter.default)
    if parameter.required or value is None or value is False or callable(value):
        return ""
    return f"`{'on' if value is True else value}`"


def table(name: str) -> str:
    """The Markdown table of a command."""
    rows = [
        f"| {written(parameter)} | {default(parameter)} | {escaped(parameter.help)} |"
        for parameter in commands()[name].params
        if parameter.name != "help"
    ]
    return "\n".join(["| argument or option | default | |", "|---|---|---|", *rows, ""])


def escaped(text: str | None) -> str:
    """Help as the cell of a table."""
    return (text or "").replace("|", r"\|").replace("\n", " ")


def with_tables(page: str) -> str:
    """A page with its tables as they should be."""
    return BLOCKS.sub(lambda block: BLOCK.format(name=block["name"], table=table(block["name"])), page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
