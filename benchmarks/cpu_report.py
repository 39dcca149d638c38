"""What the CPU benchmarks print and write: one table, the same columns in a CSV, bars of the ratios."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qnext_plugins.cli.bench.roofs import Roofs

COLUMNS = ("op", "shape", "threads", "ours_ms", "peer", "peer_ms", "ratio", "roof_pct")
WORDS = ("op", "shape", "peer", "roof", "bound")
"""Columns of words, not of numbers."""


@dataclass
class Result:
    """A measured row; times in seconds, work as in a ``Case``; without a peer's time, no ratio."""

    op: str
    shape: str
    threads: int
    ours: float
    peer_name: str
    peer: float | None
    flops: float
    moved: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.peer is None else self.peer / self.ours

    def cells(self, roofs: Roofs) -> tuple[str, ...]:
        """The values of :data:`COLUMNS`, then which roof it is; "-" for inputs that stay in cache."""
        percent = bound = "-"
        if self.moved is not None:
            least, bound = roofs.seconds(self.threads, self.flops, self.moved)
            percent = f"{100 * least / self.ours:.0f}"
        peer, ratio = ("-", "-") if self.peer is None else (milliseconds(self.peer), f"{self.ratio:.2f}")
        row = (self.op, self.shape, str(self.threads), milliseconds(self.ours), self.peer_name, peer, ratio)
        return (*row, percent, bound)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def parse(parser: argparse.ArgumentParser, *, plot: bool = True) -> argparse.Namespace:
    """The command line of ``parser``, with the options that the benchmarks share."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=positive_numbers, default="1,2" if cores > 1 else "1", help="default 1,2")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table and the machine to FILE")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios (needs matplotlib)")
    args = parser.parse_args()
    if max(args.threads) > cores:
        parser.error(f"--threads: this process may use {cores} cores")
    return args


def positive_numbers(value: str) -> list[int]:
    """Whole numbers separated by commas, in order; raises ValueError."""
    numbers = sorted({int(part) for part in value.split(",")})
    if numbers[0] < 1:
        raise ValueError
    return numbers


def make_console() -> Console:
    """Wide enough for the table where it does not go to a terminal."""
    return Console(width=None if sys.stdout.isatty() else 170)


def report(args: argparse.Namespace, console: Console, header: list[str], results: list[Result], roofs: Roofs) -> None:
    """Print the header and the table, and write what ``args`` of :func:`parse` ask for."""
    cells = [result.cells(roofs) for result in results]
    print_table(console, header, (*COLUMNS, "roof"), cells)
    if args.csv:
        write_csv(args.csv, header, COLUMNS, [row[: len(COLUMNS)] for row in cells])
    if args.plot and (reason := write_plot(args.plot, header[0], results)) is not None:
        console.print(reason)


def print_table(console: Console, header: list[str], columns: Sequence[str], rows: list[tuple[str, ...]]) -> None:
    """The header's lines, then the table."""
    for line in header:
        console.print(line, markup=False, highlight=False)
    table = Table()
    for column in columns:
        words = column in WORDS
        table.add_column(column, justify="left" if words else "right", no_wrap=column != "peer", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_and_write(path: Path | None, header: list[str], columns: Sequence[str], rows: list[tuple[str, ...]]) -> None:
    """Print the header and the table, and write them to ``path`` if there is one."""
    print_table(make_console(), header, columns, rows)
    if path:
        write_csv(path, header, columns, rows)


def write_csv(path: Path, header: list[str], columns: Sequence[str], rows: list[tuple[str, ...]]) -> None:
    """The header's lines as comments, then the table."""
    with path.open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in header)
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def write_plot(path: Path, title: str, results: list[Result]) -> str | None:
    """Bars of peer / ours; returns why there is none."""
    try:
        import matplotlib
    except ImportError:
        return "--plot needs matplotlib (pip install matplotlib); no plot was written"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [result for result in results if result.ratio]
    # Whom a row is compared with is said where the same one is there twice.
    several = len({(row.op, row.shape, row.threads) for row in rows}) < len(rows)
    beside = [f" beside {row.peer_name}" if several else "" for row in rows]
    compared = [(f"{r.op}, {r.shape}{peer}", r.threads, r.ratio) for r, peer in zip(rows, beside, strict=True)]
    labels = list(dict.fromkeys(label for label, _, _ in compared))
    threads = sorted({count for _, count, _ in compared})
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.3 * len(labels)), layout="constrained")
    for n, count in enumerate(threads):
        bars = {label: ratio for label, used, ratio in compared if used == count}
        offset = 0.8 * ((n + 0.5) / len(threads) - 0.5)
        places = [labels.index(label) + offset for label in bars]
        axes.barh(places, list(bars.values()), height=0.8 / len(threads), label=f"threads={count}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="time of the peer / ours (right of 1: ours is faster)")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_title(title, fontsize="small", loc="left")
    axes.legend()
    figure.savefig(path, dpi=120)
    return None
