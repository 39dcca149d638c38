#!/usr/bin/env python3
"""Plots of what gpu_ops.py measured: ratios to every peer, and how much of the roof each shape reaches.

python benchmarks/gpu_plots.py ops.csv [FOLDER]
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]
"""A line of the CSV; what is missing is None or empty."""


def write_plots(folder: Path, title: str, lines: Sequence[Line]) -> str:
    """Write ``ratios.png`` and ``roofs.png``; returns what was written, or why nothing."""
    try:
        import matplotlib
    except ImportError:
        return "plots need matplotlib (pip install matplotlib); none were written"
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in (("ratios.png", draw_ratios), ("roofs.png", draw_roofs)):
        if (figure := draw(title, lines)) is not None:
            figure.savefig(folder / name, dpi=110)
            written.append(name)
    return f"plots in {folder}: {', '.join(written) or 'none, nothing to draw'}"


def draw_ratios(title: str, lines: Sequence[Line]) -> Any:
    """Bars of peer / ours, a panel an operation."""
    compared = [line for line in lines if line["ratio"]]
    return panels(title, compared, "time of the peer / ours (right of 1: ours is faster)", draw_bars)


def draw_bars(axes: Any, lines: Sequence[Line]) -> None:
    several = len({line["backend"] for line in lines}) > 1
    labels = [" ".join((line["shape"], line["peer"], line["backend"] if several else "")) for line in lines]
    ratios = [float(line["ratio"]) for line in lines]
    axes.barh(range(len(lines)), ratios, color=["tab:green" if ratio >= 1 else "tab:red" for ratio in ratios])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(lines)), labels, fontsize=6)
    axes.invert_yaxis()


def draw_roofs(title: str, lines: Sequence[Line]) -> Any:
    """Percent of the roof over the tokens or sequences of a call, a panel an operation."""
    roofed = [line for line in lines if line["roof_pct"]]
    return panels(title, roofed, "percent of the measured roof, over M, T or B", draw_curves)


def draw_curves(axes: Any, lines: Sequence[Line]) -> None:
    curves: dict[str, dict[int, float]] = {}
    for line in lines:
        size, rest = size_of(line["shape"])
        curves.setdefault(f"{line['backend']} {rest}".strip(), {})[size] = float(line["roof_pct"])
    for label, points in curves.items():
        axes.plot(sorted(points), [points[size] for size in sorted(points)], marker="o", markersize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 105)
    axes.legend(fontsize=6)


def size_of(shape: str) -> tuple[int, str]:
    """The number that grows in a shape such as "B=64 × 3 tokens", and what is left of it."""
    found = re.search(r"\b[MTB]=(\d+)", shape)
    if found is None:
        return 1, shape
    return int(found[1]), " ".join((shape[: found.start()] + shape[found.end() :]).split())


def panels(title: str, lines: Sequence[Line], label: str, draw: Any) -> Any:
    """A figure with a panel an operation, or None without any line."""
    from matplotlib import pyplot

    ops: dict[str, list[Line]] = {}
    for line in lines:
        ops.setdefault(line["op"], []).append(line)
    if not ops:
        return None
    columns = min(3, len(ops))
    rows = -(-len(ops) // columns)
    tallest = max(map(len, ops.values())) if draw is draw_bars else 16
    size = (6 * columns, rows * max(2.5, 0.16 * tallest) + 0.8)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(ops) :]:
        axes.axis("off")
    for axes, (op, of_op) in zip(grid.flat, ops.items(), strict=False):
        draw(axes, of_op)
        axes.set_title(op, fontsize="small", loc="left")
    figure.suptitle(f"{title}\n{label}", fontsize="small")
    return figure


def main(arguments: Sequence[str]) -> int:
    if len(arguments) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    file = Path(arguments[0])
    text = file.read_text().splitlines()
    title = text[0].removeprefix("# ") if text[0].startswith("#") else ""
    lines = list(csv.DictReader(line for line in text if not line.startswith("#")))
    print(write_plots(Path(arguments[1]) if len(arguments) > 1 else file.parent, title, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
