"""The frame of the ``qnext`` command: a table of subcommands, each imported only when it is called."""

from __future__ import annotations

import pkgutil
from typing import Annotated

import typer

import qnext_plugins

COMMANDS = {
    "doctor": ("qnext_plugins.cli.doctor.command:doctor", "Check this environment, and say what to mend and how."),
    "checkpoint": (
        "qnext_plugins.cli.checkpoint.command:checkpoint",
        "Write a Qwen3-Next checkpoint of a chosen size, whose greedy continuation can be known.",
    ),
    "compare": (
        "qnext_plugins.cli.compare.command:compare",
        "Compare servers: do they give the same tokens, and how fast?",
    ),
    "bench": ("qnext_plugins.cli.bench.command:app", "Measure kernels, servers, and the release's claims."),
}
"""Name: (function or Typer app, one line of help). A function's own signature is its command line."""

# All that stands behind the name belongs to the subcommand.
PASS_ON = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}

app = typer.Typer(
    help="Tools around Qwen3-Next in vLLM and SGLang.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"qnext-plugins {qnext_plugins.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of every subcommand: none but ``--version``, which acts when it is read."""


def add_command(name: str, target: str, summary: str) -> None:
    """Add a subcommand whose function ``target``, written ``module:function``, is imported when it runs."""

    @app.command(name, help=summary, context_settings=PASS_ON, add_help_option=False)
    def run(context: typer.Context) -> None:
        try:
            function = pkgutil.resolve_name(target)
        except ImportError as error:
            typer.echo(f"qnext {name}: {error}; install qnext-plugins again (pip install .)", err=True)
            raise typer.Exit(2) from None
        if isinstance(function, typer.Typer):
            command = function
        else:
            command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            command.command(name)(function)
        command(context.args, prog_name=f"qnext {name}")


for _name, (_target, _summary) in COMMANDS.items():
    add_command(_name, _target, _summary)


def main() -> None:
    app(prog_name="qnext")
