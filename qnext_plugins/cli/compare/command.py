"""``qnext compare A B [C]``: the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from qnext_plugins.cli.arguments import INTERRUPTED, ArgumentError, check_writable, ends_on_sigterm, positive_numbers
from qnext_plugins.cli.compare.page import write_page
from qnext_plugins.cli.compare.prompts import PromptsError, load_prompts
from qnext_plugins.cli.compare.report import Report
from qnext_plugins.cli.compare.run import Options, make
from qnext_plugins.cli.compare.sides import Pythons, SpecError, parse_sides
from qnext_plugins.cli.compare.terminal import show
from qnext_plugins.cli.progress import Progress

FILE_WIDTH = 140
"""Columns of a report that goes into a file or a pipe."""


def compare(
    sides: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C...]",
            help="Each a server's URL, or an engine to start: 'vllm:MODEL FLAGS', 'sglang:MODEL FLAGS' or 'hf:MODEL "
            "FLAGS' (transformers), in quotes if there are flags; 'name=' before it names it in the report.",
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSONL with a prompt or messages a line, instead of the 32 texts that come with the tool."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask every text as a user's message.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 64,
    dtype: Annotated[
        str | None, typer.Option(help="--dtype of every engine that is started and whose flags have none.")
    ] = None,
    concurrency: Annotated[
        str, typer.Option(help="Requests at a time when performance is measured; several with commas.")
    ] = "1,4",
    requests: Annotated[int, typer.Option(min=1, help="Requests for each of these.")] = 16,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Whether performance is measured.")] = True,
    without_speculation: Annotated[
        bool,
        typer.Option("--without-speculation", help="Start every engine that speculates once more without its drafts."),
    ] = False,
    referee: Annotated[
        str | None, typer.Option(help="The side whose word decides; by default transformers, else the third.")
    ] = None,
    tie_gap: Annotated[
        float | None,
        typer.Option(
            min=0, help="Gap of the best two tokens up to which either may win; by default measured (see the report)."
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Mean |Δ log p| that is agreement; by default 0.001 in float32, else as measured, or 0.1.",
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was found to this file.")] = (
        None
    ),
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a page with plots to this file.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the logs of the servers that are started.")] = Path(
        "qnext-compare"
    ),
    python_vllm: Annotated[
        str | None, typer.Option(help="Python of vLLM's environment; by default $QNEXT_VLLM_PYTHON, else this one.")
    ] = None,
    python_sglang: Annotated[str | None, typer.Option(help="The same for SGLang, $QNEXT_SGLANG_PYTHON.")] = None,
    python_hf: Annotated[str | None, typer.Option(help="The same for transformers, $QNEXT_HF_PYTHON.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to ask the servers of URLs for; by default the first that each names.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Key to send to the servers of URLs.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that one request may take.")] = 300,
    start_timeout: Annotated[float, typer.Option(min=1, help="Seconds that an engine may take to start.")] = 600,
    one_at_a_time: Annotated[
        bool,
        typer.Option(
            "--one-at-a-time", help="Run one engine at a time, for a machine that holds one model; starts twice."
        ),
    ] = False,
) -> None:
    """Send the same prompts to two or more servers and tell who agrees, who does not, and what is faster.

    Ends with status 0 if all agree, 1 if some do not, 2 if it could not be done or not in full, or not be decided.
    """
    try:
        specs = parse_sides(sides, dtype=dtype, without_speculation=without_speculation)
        names = [spec.name for spec in specs]
        if referee is not None and referee not in names:
            raise SpecError(f"--referee: expected one of {', '.join(names)}, got {referee!r}")
        options = Options(
            prompts=load_prompts(prompts, limit=limit, chat=chat),
            max_tokens=max_tokens,
            concurrency=positive_numbers("--concurrency", concurrency),
            requests=requests,
            speed=speed,
            referee=referee,
            tie_gap=tie_gap,
            tolerance=tolerance,
            pythons=Pythons.given(vllm=python_vllm, sglang=python_sglang, hf=python_hf),
            model=model,
            api_key=api_key,
            timeout=timeout,
            start_timeout=start_timeout,
            one_at_a_time=one_at_a_time,
            output=output,
        )
        for name, file in (("--json", json_file), ("--html", html_file)):
            check_writable(name, file)
    except PromptsError as error:
        _fail(f"--prompts: {error}")
    except (ArgumentError, SpecError) as error:
        _fail(str(error))
    with ends_on_sigterm():
        report = make(specs, options, Progress(Console(stderr=True, highlight=False)))
    _write(report, json_file, html_file)
    console = Console(highlight=False)
    # Where there is no terminal, rich takes 80 columns, too few for the tables.
    show(report, console if console.is_terminal else Console(highlight=False, width=FILE_WIDTH))
    raise typer.Exit(INTERRUPTED if report.interrupted else report.status.exit_code)


def _fail(line: str) -> NoReturn:
    typer.echo(f"qnext compare: {line}", err=True)
    raise typer.Exit(2)


def _write(report: Report, json_file: Path | None, html_file: Path | None) -> None:
    if json_file is not None:
        json_file.write_text(report.model_dump_json() + "\n")
    if html_file is not None:
        write_page(report, html_file)
