#!/usr/bin/env python3
"""Write the table of measured backends (kernels/qnext_kernels/backend_table.csv) from results of benchmarks.

    python benchmarks/write_backend_table.py results.csv [...] [--device "NVIDIA H200"] [--table FILE]

A result is a CSV with the columns op,shape,ours_ms,backend,peer,peer_ms,ratio,roof_pct, every backend of ours in a line
of its own, and the GPU in a comment (`# device: NVIDIA H200, sm_90, …`) unless --device names it. Peers are not read:
what is not a backend cannot serve; nor are ours that serve only where they are asked for. Lines of the table about
the same GPU, operation and sizes are replaced, all others stay. The exit status is 0, or 2 with a line that says what
is wrong.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from qnext_kernels.backend_table import COLUMNS, PATH, Key, Measured, TableError, read
from qnext_kernels.dispatch import BACKEND_NAMES, OPERATION_NAMES, OPERATIONS
from qnext_plugins.cli.bench.inputs import BF16, REAL, Sizes

RESULT_COLUMNS = ("op", "shape", "ours_ms", "backend", "peer", "peer_ms", "ratio", "roof_pct")
DEVICE = re.compile(r"#\s*device: (?P<name>.+?)(, (sm_|gfx)\w+.*)?$")
SHAPE = re.compile(
    r"(?P<count>[BMT]=\d+)( × (?P<each>\d+) tokens)?( N=(?P<sequences>\d+) ragged)?( tp=(?P<ranks>\d+))?"
)
"""Of a case that the table tells apart: not of a context."""


class Case(NamedTuple):
    """What an ``op`` of the benchmarks calls."""

    operation: str
    method: str
    shape: Callable[[Sizes], tuple[int, ...]]
    """As the operation puts it into ``Call.shape``."""


def _delta_rule(sizes: Sizes) -> tuple[int, ...]:
    return sizes.key_heads, sizes.value_heads, sizes.linear_dim, sizes.linear_dim


CASES = {
    "delta rule prefill": Case("gated_delta_rule", "prefill", _delta_rule),
    "delta rule decode": Case("gated_delta_rule", "decode", _delta_rule),
    "delta rule verify": Case("gated_delta_rule", "verify", _delta_rule),
    "rms norm + residual": Case("rms_norm", "rms_norm", lambda sizes: (sizes.hidden,)),
}
"""Those with more than one fast backend on a GPU; others have nothing to choose from."""
ASKED_FOR = ("triton_context_parallel",)
"""What these take depends on how many sequences there are, which a line of the table does not have."""


class Result(NamedTuple):
    """A backend's time of a case."""

    device: str
    key: Key
    tokens: int
    backend: str
    ms: float
    described: str = ""
    """The shape as the results have it: of several sequences, or of one."""


class ResultError(ValueError):
    """A file of results cannot be read; the message names the line."""


def results(path: Path, device: str | None = None) -> Iterator[Result]:
    """What a CSV says of the cases in :data:`CASES`, on the GPU that it names or on ``device``."""
    text = path.read_text().splitlines()
    named = device or next((found["name"] for line in text if (found := DEVICE.match(line))), None)
    if named is None:
        raise ResultError(f"{path}: no comment says which GPU it was (# device: NAME, …); --device NAME would")
    rows = csv.reader(["" if line.startswith("#") else line for line in text])
    filled = filter(None, rows)
    if (header := tuple(next(filled, ()))) != RESULT_COLUMNS:
        raise ResultError(f"{path}: expected the columns {','.join(RESULT_COLUMNS)}, got {','.join(header)}")
    for cells in filled:
        where = f"{path}:{rows.line_num}"
        if len(cells) != len(RESULT_COLUMNS):
            raise ResultError(f"{where}: expected {len(RESULT_COLUMNS)} values, got {len(cells)}")
        op, shape, ms, backend, *_ = cells
        case, found = CASES.get(op), SHAPE.fullmatch(shape)
        if case is None or found is None:
            continue
        if backend not in BACKEND_NAMES:
            raise ResultError(f"{where}: backend: expected one of {', '.join(BACKEND_NAMES)}, got {backend!r}")
        if backend in ASKED_FOR:
            continue
        sizes = REAL.shard(int(found["ranks"] or 1))
        tokens = int(found["count"].partition("=")[2]) * int(found["each"] or 1) // int(found["sequences"] or 1)
        key = (case.operation, case.method, BF16, case.shape(sizes))
        yield Result(named, key, tokens, backend, _time(where, ms), shape)


def _time(where: str, text: str) -> float:
    try:
        ms = float(text)
    except ValueError:
        ms = math.nan
    if not 0 < ms < math.inf:
        raise ResultError(f"{where}: ours_ms: expected a positive number, got {text!r}")
    return ms


def fastest(found: Iterable[Result], margin: float) -> list[Measured]:
    """A line for each number of tokens at which several backends were measured.

    Args:
        found: times; of several of one backend in one case the least counts.
        margin: by how much, relative, a backend must be faster than one that stands before it in the operation's list,
            in each case of as many tokens a sequence.
    """
    times: dict[tuple[str, Key, int], dict[str, dict[str, float]]] = {}
    for each in found:
        of_case = times.setdefault((each.device, each.key, each.tokens), {}).setdefault(each.described, {})
        of_case[each.backend] = min(each.ms, of_case.get(each.backend, math.inf))
    lines = []
    for (device, key, tokens), cases in times.items():
        order = [backend.name for backend in OPERATIONS[key[0]].backends]
        chosen: list[tuple[int, float]] = []
        for of_case in cases.values():
            if len(of_case) > 1:
                enough = (1 + margin) * min(of_case.values())
                name = next(name for name in order if of_case.get(name, math.inf) <= enough)
                chosen.append((order.index(name), of_case[name]))
        if chosen:
            place, ms = min(chosen)
            lines.append(Measured(device, key, tokens, order[place], ms))
    return lines


def merged(old: Iterable[Measured], new: Sequence[Measured]) -> list[Measured]:
    """The lines of ``new``, and those of ``old`` about other GPUs, operations and sizes, in order."""
    replaced = {(line.device, line.key) for line in new}
    kept = [line for line in old if (line.device, line.key) not in replaced]
    return sorted([*kept, *new], key=lambda line: (line.device, *line.cells()[1:5], line.tokens))


def write(path: Path, lines: Iterable[Measured]) -> None:
    """Replace the table; the comments at its head stay."""
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")] if path.exists() else []
    with path.open("w", newline="") as file:
        file.writelines(f"{line}\n" for line in comments)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(line.cells() for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE", help="results of benchmarks")
    parser.add_argument("--device", metavar="NAME", help="the GPU that was measured, or an architecture: sm_90")
    parser.add_argument("--table", type=Path, default=PATH, metavar="FILE", help="by default that of qnext_kernels")
    parser.add_argument("--margin", type=float, default=0.05, help="how much faster than one before it; default 0.05")
    args = parser.parse_args(arguments)
    try:
        old = read(args.table, OPERATION_NAMES, BACKEND_NAMES).lines if args.table.exists() else ()
        new = fastest([each for path in args.results for each in results(path, args.device)], args.margin)
    except (OSError, ResultError, TableError) as error:
        print(f"write_backend_table.py: {error}", file=sys.stderr)
        return 2
    write(args.table, merged(old, new))
    for line in new:
        print(",".join(line.cells()))
    print(f"{args.table}: {len(new)} new lines", file=sys.stderr)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
