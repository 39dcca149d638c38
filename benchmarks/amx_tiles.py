#!/usr/bin/env python3
"""How long a product of AMX takes with four to eight tiles in use, the core's other thread asleep or awake.

    python benchmarks/amx_tiles.py [--seconds 20] [--csv FILE]

A loop loads tiles from the first cache and multiplies them, two of rows with two of columns, or fewer. A core whose
other thread is awake, in this system or, on a virtual machine, in another, has few registers for the tiles of each:
then a product takes the longer the more tiles are in use. So a sample is one of an awake thread where eight tiles
take 1.5 times as long as four, before and after. Medians of the samples of each kind are printed, in nanoseconds.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from cpu_report import print_and_write

from qnext_kernels import native
from qnext_plugins.cli.bench.roofs import describe_machine

COLUMNS = ("tiles", "asleep_ns", "awake_ns")
USED = (4, 5, 6, 7, 8)
ROUNDS = 500
TURNS = 3
"""Times that each loop runs; the least counts."""
FACTOR = 1.5

Sample = dict[int, float]
"""Seconds of a product by the tiles in use."""


def compile_loops(folder: Path) -> Callable[[int], float]:
    """amx_tiles.cpp with the kernels' own compiler and flags: seconds of a product with so many tiles in use.

    Raises:
        NativeError: there is no compiler, or the processor has no AMX.
    """
    isa, library = native.instruction_set(), folder / "amx_tiles.so"
    if not isa.startswith("amx"):
        raise native.NativeError(f"needs a processor with AMX, and a compiler and system that know it; this has {isa}")
    source, tiles = Path(__file__).with_suffix(".cpp"), Path(native.__file__).parent / "csrc"
    flags = [*native.FLAGS, *native.compiler_flags(isa), f"-I{tiles}"]
    native.run([*native.compiler(), *flags, "-shared", str(source), "-o", str(library)])
    function = ctypes.CDLL(str(library)).seconds_of_product
    function.restype = ctypes.c_double
    return lambda used: min(function(used, ROUNDS) for _ in range(TURNS))


def take(product: Callable[[int], float]) -> tuple[Sample, bool | None]:
    """A sample, and whether the other thread was awake: None where that changed."""
    before = product(USED[-1])
    sample = {used: product(used) for used in USED}
    slow = [eight > FACTOR * sample[USED[0]] for eight in (before, sample[USED[-1]])]
    return sample, slow[0] if slow[0] == slow[1] else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="default 20")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table and the machine to FILE")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        try:
            product = compile_loops(Path(folder))
        except native.NativeError as error:
            parser.error(str(error))
        samples, end = [take(product)], time.monotonic() + args.seconds
        while time.monotonic() < end:
            samples.append(take(product))
    kinds = {awake: [sample for sample, was in samples if was is awake] for awake in (False, True, None)}
    share, rest = (f"{len(kinds[kind]) / len(samples):.0%}" for kind in (True, None))
    header = describe_machine()
    header.append(f"samples: {len(samples)}; the core's other thread was awake in {share}, and changed in {rest}")

    def cell(awake: bool, used: int) -> str:
        return f"{median(sample[used] for sample in kinds[awake]) * 1e9:.1f}" if kinds[awake] else "-"

    cells = [(str(used), cell(False, used), cell(True, used)) for used in USED]
    print_and_write(args.csv, header, COLUMNS, cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
