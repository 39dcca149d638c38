"""The command line of ``qnext bench``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.console import Console

from qnext_plugins.cli.arguments import INTERRUPTED, ArgumentError, check_writable, ends_on_sigterm, positive_numbers
from qnext_plugins.cli.bench.output import BenchReport, Files
from qnext_plugins.cli.doctor.findings import one_line
from qnext_plugins.cli.progress import Progress

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

AnyReport = TypeVar("AnyReport", bound=BenchReport)
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write everything that was found to this file, after every result.")
]
CsvFile = Annotated[Path | None, typer.Option("--csv", help="Write the table to this file, after every result.")]


@app.callback()
def bench() -> None:
    """Measure kernels, servers, and the release's claims."""


@app.command()
def kernels(
    ops: Annotated[str, typer.Option(help="Only operations whose name contains one of these words, with commas.")] = "",
    backend: Annotated[str, typer.Option(help="Only these backends, with commas; by default all that serve.")] = "",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default what torch would compute on.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Take the share of one of so many tensor-parallel ranks.")] = 1,
    threads: Annotated[
        str | None, typer.Option(help="Threads of a CPU, several with commas; by default its usable cores.")
    ] = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Whether other libraries are timed too.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes and turns.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small sizes, to try it out; the times mean nothing.")] = False,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
) -> None:
    """Time every backend of every operation at the layer sizes of Qwen3-Next-80B-A3B.

    Ratios are another's time over ours: above 1 ours is faster. The percent of roof is the least time that memory or
    arithmetic of this device allow over ours. All sides must agree within bfloat16's rounding before they are timed.
    Ends with status 0, or 2 if something could not be measured.
    """
    from qnext_kernels.dispatch import BACKEND_NAMES
    from qnext_plugins.cli.bench.inputs import GPU, GPU_QUICK, REAL, TINY
    from qnext_plugins.cli.bench.kernels import KernelsBench, Options
    from qnext_plugins.cli.bench.terminal import show_kernels
    from qnext_plugins.cli.doctor.command import quiet_engines
    from qnext_plugins.cli.doctor.machine import device_type

    try:
        here = device_type()
        if device not in (None, "cpu", here):
            raise ArgumentError(f"--device: expected cpu{'' if here == 'cpu' else f' or {here}'}, got {device!r}")
        wanted = tuple(filter(None, (name.strip() for name in backend.split(","))))
        if unknown := [name for name in wanted if name not in BACKEND_NAMES]:
            raise ArgumentError(f"--backend: expected some of {', '.join(BACKEND_NAMES)}, got {unknown[0]!r}")
        on_cpu = (device or here) == "cpu"
        full = REAL if on_cpu else GPU_QUICK if quick else GPU
        try:
            sizes = (TINY if tiny else full).shard(tp)
        except ValueError as error:
            raise ArgumentError(f"--tp: {error}") from None
        options = Options(
            sizes={tp: sizes},
            ops=tuple(word.strip() for word in ops.split(",")),
            backends=wanted,
            device=device or here,
            threads=_threads(threads) if on_cpu else (1,),
            quick=quick,
            peers=peers,
            seconds=0.05 if tiny else (0.7 if quick else 6) if on_cpu else (0.1 if quick else 0.5),
        )
        with quiet_engines():
            run = KernelsBench(options, _files(json_file, csv_file), _progress())
            run.rows()
    except (ArgumentError, ValueError) as error:
        _fail("kernels", str(error))
    _finish(run.report, run.files, run.run, show_kernels)


@app.command()
def serve(
    target: Annotated[
        str,
        typer.Argument(
            metavar="SERVER",
            help="A server's URL, or an engine to start: 'vllm:MODEL FLAGS' or 'sglang:MODEL FLAGS', in quotes.",
        ),
    ],
    tool: Annotated[
        str | None,
        typer.Option(
            help="vllm or sglang: whose benchmark measures; by default the started engine's, for a URL that of the "
            "engine in this environment."
        ),
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Requests at a time; several with commas.")] = "1,4,16",
    requests: Annotated[int, typer.Option(min=1, help="Requests for each of these, at least as many.")] = 32,
    input_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, random ones.")] = 256,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate for each.")] = 64,
    model: Annotated[
        str | None, typer.Option(help="Model to ask the server of a URL for; by default the first that it names.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder of the tokenizer that makes the prompts; by default the model's.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Key to send to the server.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one load may take.")] = 1800,
    start_timeout: Annotated[float, typer.Option(min=1, help="Seconds that an engine may take to start.")] = 600,
    output: Annotated[Path, typer.Option(help="Folder of logs and of the tools' own result files.")] = Path(
        "qnext-bench"
    ),
    python_vllm: Annotated[
        str | None, typer.Option(help="Python of vLLM's environment; by default $QNEXT_VLLM_PYTHON, else this one.")
    ] = None,
    python_sglang: Annotated[str | None, typer.Option(help="The same for SGLang, $QNEXT_SGLANG_PYTHON.")] = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
) -> None:
    """Put growing load on a server with vLLM's or SGLang's own benchmark.

    Prompts are random tokens, nothing is downloaded. Ends with status 0, or 2 if a load could not be measured in full.
    """
    from qnext_plugins.cli.bench.serve import TOOLS, Options, ServeBench
    from qnext_plugins.cli.bench.terminal import show_serve
    from qnext_plugins.cli.compare.sides import Pythons, SpecError, check_model, parse_side

    try:
        spec = parse_side(target)
        check_model(spec)
        if spec.kind == "hf":
            raise ArgumentError(f"SERVER: expected a URL, vllm:MODEL or sglang:MODEL, got {target!r}")
        if tool is not None and tool not in TOOLS:
            raise ArgumentError(f"--tool: expected vllm or sglang, got {tool!r}")
        options = Options(
            tool=tool,
            concurrency=positive_numbers("--concurrency", concurrency),
            requests=requests,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            model=model if not spec.started else None,
            tokenizer=tokenizer,
            api_key=api_key,
            timeout=timeout,
            start_timeout=start_timeout,
            pythons=Pythons.given(vllm=python_vllm, sglang=python_sglang),
            output=output,
        )
        run = ServeBench(spec, options, _files(json_file, csv_file), _progress())
    except (ArgumentError, SpecError) as error:
        _fail("serve", str(error))
    _finish(run.report, run.files, run.run, show_serve)


@app.command()
def headline(
    context: Annotated[
        str, typer.Option(help="Tokens of context, several with commas; multiples of --chunk.")
    ] = "4096,32768",
    batch: Annotated[str, typer.Option(help="Sequences of a decode step; several with commas.")] = "1",
    phase: Annotated[str, typer.Option(help="prefill, decode, or both with a comma.")] = "prefill,decode",
    layers: Annotated[int, typer.Option(min=4, help="Of Qwen3-Next, a multiple of 4.")] = 4,
    dense_layers: Annotated[int, typer.Option(min=1, help="Of Qwen3-32B.")] = 1,
    experts: Annotated[int, typer.Option(min=10, help="Of Qwen3-Next, 6.3 MB each in every layer.")] = 512,
    vocabulary: Annotated[int, typer.Option(min=1024, help="Tokens that the heads know.")] = 151936,
    chunk: Annotated[int, typer.Option(min=64, help="Tokens of a step of prefill.")] = 2048,
    threads: Annotated[str | None, typer.Option(help="Of each engine; by default its usable cores.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each model.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="One turn of each model.")] = False,
    eager: Annotated[bool, typer.Option("--eager", help="Without torch.compile.")] = False,
    output: Annotated[Path, typer.Option(help="Folder of the engines' logs.")] = Path("qnext-bench"),
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
) -> None:
    """Reproduce the release's claims as ratios: Qwen3-Next-80B-A3B against Qwen3-32B, in vLLM on this machine.

    Slices with random weights at real widths take turns; times of layers are extrapolated to the full depth. Beside the
    ratio of tokens a second stand the release's and the one that FLOP (prefill) or bytes (decode) alone predict. Ends
    with status 0, or 2 if something could not be measured.
    """
    from qnext_plugins.cli.bench.headline import HeadlineBench, Options, Phase
    from qnext_plugins.cli.bench.terminal import show_headline

    known: dict[str, Phase] = {"prefill": "prefill", "decode": "decode"}
    try:
        contexts = positive_numbers("--context", context)
        if wrong := [tokens for tokens in contexts if tokens % chunk]:
            raise ArgumentError(f"--context: expected multiples of --chunk, {chunk}, got {wrong[0]}")
        if layers % 4:
            raise ArgumentError(f"--layers: expected a multiple of 4, got {layers}")
        if unknown := [name for name in phase.split(",") if name not in known]:
            raise ArgumentError(f"--phase: expected prefill, decode, or both with a comma, got {unknown[0]!r}")
        counts = _threads(threads)
        if len(counts) > 1:
            raise ArgumentError(f"--threads: expected one number, got {threads!r}")
        options = Options(
            contexts=contexts,
            batches=positive_numbers("--batch", batch),
            phases=tuple(known[name] for name in phase.split(",")),
            layers=layers,
            dense_layers=dense_layers,
            experts=experts,
            vocabulary=vocabulary,
            chunk=chunk,
            threads=counts[0],
            rounds=rounds,
            quick=quick,
            eager=eager,
            logs=output,
        )
        run = HeadlineBench(options, _files(json_file, csv_file), _progress())
    except ArgumentError as error:
        _fail("headline", str(error))
    _finish(run.report, run.files, run.run, show_headline)


def _threads(text: str | None) -> tuple[int, ...]:
    cores = len(os.sched_getaffinity(0))
    counts = (cores,) if text is None else positive_numbers("--threads", text)
    if max(counts) > cores:
        raise ArgumentError(f"--threads: expected at most the {cores} cores that this process may use, got {text}")
    return counts


def _files(json_file: Path | None, csv_file: Path | None) -> Files:
    for name, file in (("--json", json_file), ("--csv", csv_file)):
        check_writable(name, file)
    return Files(json_file, csv_file)


def _progress() -> Progress:
    return Progress(Console(stderr=True, highlight=False))


def _fail(name: str, line: str) -> NoReturn:
    typer.echo(f"qnext bench {name}: {line}", err=True)
    raise typer.Exit(2)


def _finish(
    report: AnyReport, files: Files, run: Callable[[], None], show: Callable[[AnyReport, Console], None]
) -> NoReturn:
    """Run it, and show and keep what there is, however it ended."""
    interrupted = False
    with ends_on_sigterm():
        try:
            run()
        except KeyboardInterrupt:
            interrupted = True
            report.problems.append("interrupted: what follows was not measured")
        # Whatever it is, what was measured is shown.
        except Exception as error:
            report.problems.append(one_line(error))
        finally:
            files.write(report)
            show(report, Console(highlight=False))
    raise typer.Exit(INTERRUPTED if interrupted else report.exit_code)
