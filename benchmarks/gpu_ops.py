#!/usr/bin/env python3
"""Every operation of qnext_kernels on this GPU: checked, and timed beside what other libraries have of it.

    python benchmarks/gpu_ops.py [--quick] [--ops experts,conv] [--tp 1,4] [--csv FILE] [--plots FOLDER]
    python benchmarks/gpu_ops.py --within 420 --resume --warm 8 --csv ops.csv [--tp 4,1,8,2]

The second measures what time allows of everything, the most telling shapes of every rank first, and goes on where it
ended when it is called again.

At the layer sizes of Qwen3-Next-80B-A3B in bfloat16. Every side of a row must agree with the reference, which computes
in float32, before it is timed. Operations of a step of decode are replayed from CUDA graphs; a second line says what
they take where Python launches them one by one. The exit status is 0, 1 if results disagree, 2 if something could not
be measured or there is no GPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_plots import write_plots
from pydantic import Field
from rich.console import Console

from qnext_kernels.dispatch import BACKEND_NAMES
from qnext_plugins.cli.arguments import ArgumentError, check_writable, ends_on_sigterm, positive_numbers
from qnext_plugins.cli.bench.inputs import GPU, GPU_FIRST, GPU_QUICK, TINY, Sizes
from qnext_plugins.cli.bench.kernels import KernelsBench, KernelsReport, Measured, Options
from qnext_plugins.cli.bench.output import Files
from qnext_plugins.cli.bench.terminal import number, show_absent, show_header, show_problems, table
from qnext_plugins.cli.doctor.findings import one_line
from qnext_plugins.cli.progress import Progress, Step
from qnext_sglang.bench import BENCH as SGLANG
from qnext_vllm.bench import BENCH as VLLM

COLUMNS = ("op", "shape", "ours_ms", "backend", "peer", "peer_ms", "ratio", "roof_pct")
NUMBERS = ("ours_ms", "peer_ms", "ratio", "roof_pct")
ONE_BY_ONE = ", one by one"
QUICK_MINUTES = 3.2
"""After so long --quick begins no further row, so that it ends within four minutes."""
WARM_SECONDS = 90.0
"""What --warm may take by default: what is not compiled then is compiled when its turn comes."""


class OpsReport(KernelsReport):
    """A line for each peer of a row; what is launched one by one in a line of its own, under its own name."""

    before: list[tuple[Any, ...]] = Field(default_factory=list)
    """Cells that an earlier run has written."""

    def columns(self) -> Sequence[str]:
        return COLUMNS

    def cells(self) -> Iterator[Sequence[Any]]:
        yield from self.before
        for row in self.rows:
            yield from lines_of(row)

    @property
    def exit_code(self) -> int:
        return 1 if self.disagreements else super().exit_code


def lines_of(row: Measured) -> Iterator[Sequence[Any]]:
    """The cells of :data:`COLUMNS` for each peer; the ratio is the peer's time over ours."""
    peers = [(f"{peer.library} {peer.kernel}", peer.ms, peer.one_by_one_ms) for peer in row.peers] or [None]
    for peer in peers:
        name, ms, _ = peer or (None, None, None)
        ratio = None if ms is None else ms / row.ms
        yield row.op, row.shape, row.ms, row.backend, name, ms, ratio, row.roof_percent
    if row.one_by_one_ms is None:
        return
    for peer in peers:
        name, _, ms = peer or (None, None, None)
        if peer is None or ms is not None:
            ratio = None if ms is None else ms / row.one_by_one_ms
            yield f"{row.op}{ONE_BY_ONE}", row.shape, row.one_by_one_ms, row.backend, name, ms, ratio, None


class Said(Progress):
    """A bar on a terminal; elsewhere a line a row, so that a log says where a run has ended."""

    @contextmanager
    def task(self, name: str, total: int, *, refresh_alone: bool = True) -> Iterator[Step]:
        with super().task(name, total, refresh_alone=refresh_alone) as step:
            if not self.console.is_terminal:
                start, show = time.monotonic(), step.say

                def say(text: str) -> None:
                    show(text)
                    self.say(f"{time.monotonic() - start:6.1f} s  {text}")

                step.say = say  # type: ignore[method-assign]
            yield step


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="", help="only operations whose name contains one of these words, with commas")
    parser.add_argument("--backend", default="", help="only these backends, with commas; by default all but reference")
    parser.add_argument("--peers", default="", help="only these: fla,flash_qla,flashinfer,sglang,torch,vllm; or none")
    parser.add_argument("--tp", help="shares of so many tensor-parallel ranks, with commas; default 1,2,4,8 (quick: 1)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and turns: four minutes on an H200")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script; its times mean nothing")
    parser.add_argument("--minutes", type=float, help="after so long no further row is begun")
    parser.add_argument(
        "--within",
        type=float,
        metavar="SECONDS",
        help="all shapes with the turns of --quick, the most telling first; after so long no further row is begun",
    )
    parser.add_argument("--resume", action="store_true", help="leave out rows that --csv has, and keep its lines")
    parser.add_argument(
        "--warm", type=int, default=0, metavar="N", help="have N processes compile what the rows need beforehand"
    )
    parser.add_argument(
        "--warm-seconds",
        type=float,
        default=WARM_SECONDS,
        metavar="SECONDS",
        help=f"the most that --warm may take, by default {WARM_SECONDS:.0f}; a kernel of FlashInfer takes up to 30",
    )
    parser.add_argument("--only-compile", metavar="I/N", help="what --warm starts: compile share I of N, time nothing")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table and the machine to FILE, row by row")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found to FILE")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw ratios and roofs (needs matplotlib)")
    return parser.parse_args(arguments)


def words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (word.strip() for word in text.split(","))))


@contextmanager
def compiling(command: Sequence[str], processes: int, seconds: float) -> Iterator[Callable[[], None]]:
    """Run ``command`` with I/N behind it for every I below N ``processes``; gives a function that waits for them.

    What runs ``seconds`` after the start is ended then, or at the end of the block.
    """
    # A process of its own for each share compiles with one thread.
    environment, end = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}, time.monotonic() + seconds
    running = [subprocess.Popen([*command, f"{share}/{processes}"], env=environment) for share in range(processes)]

    def kill() -> None:
        for each in running:
            each.kill()
            each.wait()

    def wait() -> None:
        try:
            for each in running:
                each.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"--warm: ended after {seconds:.0f} s", file=sys.stderr)
            kill()

    try:
        yield wait
    finally:
        kill()


def share_of(text: str) -> tuple[int, int]:
    """I and N of I/N; raises ArgumentError."""
    share, slash, shares = text.partition("/")
    if not (slash and share.isdecimal() and shares.isdecimal() and int(share) < int(shares)):
        raise ArgumentError(f"--only-compile: expected I/N, I below N, got {text!r}")
    return int(share), int(shares)


def lines_before(args: argparse.Namespace, device: str) -> list[tuple[Any, ...]]:
    """The cells that --csv has already, if they are to be kept; raises ArgumentError if another GPU wrote them."""
    if not args.resume:
        return []
    if args.csv is None:
        raise ArgumentError("--resume: expected --csv FILE with what has been measured")
    if not args.csv.exists():
        return []
    with args.csv.open(newline="") as file:
        text = file.readlines()
    of_device = next((line for line in text if line.startswith("# device: ")), "# device: an unknown one,")
    if (found := of_device.removeprefix("# device: ").partition(",")[0].strip()) != device:
        raise ArgumentError(f"--resume: expected results of {device} in {args.csv}, got those of {found}")
    lines = csv.DictReader(line for line in text if not line.startswith("#"))
    if tuple(lines.fieldnames or ()) != COLUMNS:
        raise ArgumentError(f"--resume: expected the columns {','.join(COLUMNS)} in {args.csv}, got {lines.fieldnames}")
    return [tuple(_value(name, line[name]) for name in COLUMNS) for line in lines]


def _value(column: str, text: str) -> Any:
    """What a cell of the CSV was."""
    if not text:
        return None
    return float(text) if column in NUMBERS else text


def options_of(args: argparse.Namespace, before: Sequence[tuple[Any, ...]] = ()) -> Options:
    """What ``args`` of :func:`parse` ask for beside lines ``before``; raises ArgumentError or ValueError."""
    if unknown := [name for name in words(args.backend) if name not in BACKEND_NAMES]:
        raise ArgumentError(f"--backend: expected some of {', '.join(BACKEND_NAMES)}, got {unknown[0]!r}")
    for name, file in (("--csv", args.csv), ("--json", args.json)):
        check_writable(name, file)
    if args.within is not None and (args.within <= 0 or args.minutes is not None):
        raise ArgumentError("--within: expected a number of seconds above 0, and no --minutes")
    sizes: Sizes = TINY if args.tiny else GPU_QUICK if args.quick else GPU
    ranks = positive_numbers("--tp", args.tp or ("1" if args.quick or args.tiny else "1,2,4,8"))
    minutes = args.minutes or (QUICK_MINUTES if args.quick else float("inf"))
    return Options(
        sizes={each: sizes.shard(each) for each in ranks},
        first={each: GPU_FIRST.shard(each) for each in ranks if args.within is not None and sizes is GPU},
        measured=frozenset((op, shape) for op, shape, *_ in before if not op.endswith(ONE_BY_ONE)),
        ops=words(args.ops) or ("",),
        backends=words(args.backend),
        device="cuda",
        quick=args.quick or args.within is not None,
        peers=args.peers != "none",
        libraries=words(args.peers),
        engines=(SGLANG, VLLM),
        seconds=0.02 if args.tiny else 0.1 if args.quick or args.within is not None else 0.5,
        time_reference=False,
        last_start=60 * minutes if args.within is None else args.within,
    )


def show(report: OpsReport, console: Console) -> None:
    """Machine and roofs, who is missing, times, problems."""
    show_header(report, console)
    show_absent(report, console)
    times = table("Operations (ratio: the peer's time over ours)", ("op", "shape", "backend", "peer"), NUMBERS)
    for op, shape, ours, backend, peer, theirs, ratio, percent in report.cells():
        cells = (number(ours), number(theirs), number(ratio, 3), number(percent, 3))
        times.add_row(op, shape, backend, peer or "–", *cells)
    console.print(times)
    show_problems(report, console)


def bench_of(options: Options, files: Files, before: Sequence[tuple[Any, ...]] = ()) -> KernelsBench:
    bench = KernelsBench(options, files, Said(Console(stderr=True, highlight=False)), OpsReport)
    assert isinstance(bench.report, OpsReport)
    bench.report.before = list(before)
    return bench


def run(bench: KernelsBench, wait: Callable[[], None], began: float, console: Console) -> OpsReport:
    """Measure behind ``wait``, and show and write what was, whatever ends it; ``began``: when the time began."""
    report = bench.report
    assert isinstance(report, OpsReport)
    try:
        wait()
        # What peers take to be imported and kernels to be compiled is of the time that there is.
        bench.options = replace(bench.options, last_start=bench.options.last_start - (time.monotonic() - began))
        bench.run()
    except (Exception, KeyboardInterrupt) as error:
        report.problems.append(one_line(error))
    finally:
        bench.files.write(report)
        show(report, console)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if not torch.cuda.is_available():
        print("gpu_ops.py: PyTorch finds no GPU here; benchmarks/cpu_ops.py measures a CPU", file=sys.stderr)
        return 2
    began, console = time.monotonic(), Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    try:
        before = lines_before(args, torch.cuda.get_device_name())
        options = options_of(args, before)
        if args.only_compile is not None:
            bench_of(options, Files(None, None)).compile(*share_of(args.only_compile))
            return 0
        given = sys.argv[1:] if arguments is None else arguments
        command = [sys.executable, __file__, *given, "--only-compile"]
        files = Files(args.json, args.csv)
        with ends_on_sigterm(), compiling(command, args.warm, args.warm_seconds) as wait:
            # Peers are imported meanwhile, which takes some of them as long.
            bench = bench_of(options, files, before)
            bench.rows()
            report = run(bench, wait, began, console)
    except (ArgumentError, ValueError) as error:
        print(f"gpu_ops.py: {error}", file=sys.stderr)
        return 2
    if args.plots is not None:
        lines = [dict(zip(COLUMNS, cells, strict=True)) for cells in report.cells()]
        console.print(write_plots(args.plots, next(iter(report.header), ""), lines))
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
