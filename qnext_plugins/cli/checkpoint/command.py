"""The command line of ``qnext checkpoint``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from qnext_plugins.cli.checkpoint.spec import WIDTHS, Dtype, Kind, Spec, SpecError, Widths
from qnext_plugins.cli.checkpoint.tokenizer import StoredTokenizer
from qnext_plugins.cli.checkpoint.writer import Plan, check_target, plan, write


def checkpoint(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    kind: Annotated[
        Kind,
        typer.Option(
            help="tiny: small widths, the greedy continuation is known. slice: the same at the widths of "
            "Qwen3-Next-80B-A3B. random: small widths, random weights."
        ),
    ] = Kind.TINY,
    layers: Annotated[int | None, typer.Option(help="Layers; every fourth is full attention. Default: 4.")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts a layer. Default: 8, of a slice 512.")] = None,
    experts_per_token: Annotated[int | None, typer.Option(help="Experts a token. Default: 2, of a slice 10.")] = None,
    hidden_size: Annotated[
        int | None, typer.Option(help="Width of the hidden states. Default: 128, of a slice 2048.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Tokens. Default: 1024 or the tokenizer's, of a slice 151936.")
    ] = None,
    mtp_acceptance: Annotated[
        float | None,
        typer.Option(help="Share of the tokens after which the first draft is right, not for random. Default: 0.7."),
    ] = None,
    mtp: Annotated[bool, typer.Option(help="With the draft's tensors.")] = True,
    yarn: Annotated[float | None, typer.Option(help="Lengthen the context by this factor with YaRN.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the tensors.")] = Dtype.BFLOAT16,
    fp8: Annotated[bool, typer.Option("--fp8", help="Linears in FP8, in blocks of 128 × 128.")] = False,
    int4: Annotated[
        int | None,
        typer.Option(help="Linears in int4 of compressed-tensors, in groups of so many columns: 32, 64 or 128."),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Beside experts in int4 the other linears in int8, as AutoRound's int4-mixed."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Another seed, another checkpoint; the same seed, the same bytes.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="Copy the tokenizer of this folder.")] = None,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Make no tokenizer.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
) -> None:
    """Write a Qwen3-Next checkpoint: tiny, random, or a slice at real widths.

    A tiny one and a slice are structured: after each token the model says a fixed other one, by a wide margin, and the
    draft is right after a chosen share of them, so that speculation accepts that share of the first drafts.
    """
    given = {
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
    }
    console = Console()
    try:
        stored = _stored_tokenizer(tokenizer, no_tokenizer)
        if stored is not None and vocab_size is None and kind != Kind.SLICE:
            given["vocab_size"] = stored.size
        widths = WIDTHS[kind].model_copy(update={name: value for name, value in given.items() if value is not None})
        planned = plan(_spec(kind, widths, mtp_acceptance, mtp, yarn, dtype, fp8, int4, int8, seed))
        check_target(out, planned, force)
        console.print(describe(planned), highlight=False, soft_wrap=True)
        if not dry_run:
            with _bar(console) as bar:
                task = bar.add_task("writing", total=planned.bytes)
                write(
                    planned,
                    out,
                    tokenizer=stored,
                    with_tokenizer=not no_tokenizer,
                    force=force,
                    progress=lambda written: bar.advance(task, written),
                )
            console.print(f"written to {out}", highlight=False, soft_wrap=True)
    except (SpecError, OSError) as error:
        typer.echo(f"qnext checkpoint: {error}", err=True)
        raise typer.Exit(2) from None


def _stored_tokenizer(folder: Path | None, unwanted: bool) -> StoredTokenizer | None:
    if folder is not None and unwanted:
        raise SpecError("--no-tokenizer: expected without --tokenizer, got both")
    return None if folder is None else StoredTokenizer(folder)


def _spec(
    kind: Kind,
    widths: Widths,
    acceptance: float | None,
    mtp: bool,
    yarn: float | None,
    dtype: Dtype,
    fp8: bool,
    int4: int | None,
    int8: bool,
    seed: int,
) -> Spec:
    if seed < 0:
        raise SpecError(f"--seed: expected 0 or more, got {seed}")
    if acceptance is not None and (kind == Kind.RANDOM or not mtp):
        other = "--kind random" if kind == Kind.RANDOM else "--no-mtp"
        raise SpecError(f"--mtp-acceptance: expected with a structured checkpoint and its draft, got {other}")
    given: dict[str, Any] = {"dtype": dtype, "fp8": fp8, "int4": int4, "int8": int8}
    if acceptance is not None:
        given["mtp_acceptance"] = acceptance
    return Spec(kind=kind, widths=widths, seed=seed, mtp=mtp, yarn=yarn, **given)


def describe(planned: Plan) -> str:
    """What is going to be written, in two lines."""
    spec, widths = planned.spec, planned.spec.widths
    draft = f"a draft right after {spec.mtp_acceptance:.0%} of the tokens" if spec.structured else "a draft"
    integers = f"int4 in groups of {spec.int4}{', all but experts in int8' if spec.int8 else ''}"
    parts = [
        f"{widths.num_hidden_layers} layers of width {widths.hidden_size}",
        f"{widths.num_experts} experts",
        f"{widths.vocab_size} tokens",
        draft if spec.mtp else "no draft",
        "block-wise FP8" if spec.fp8 else integers if spec.int4 else spec.dtype,
    ]
    size = f"{planned.parameters:,} parameters, {planned.bytes:,} bytes in {len(planned.shards)} file"
    return f"{spec.kind}: {', '.join(parts)}\n{size}{'s' if len(planned.shards) > 1 else ''}"


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
