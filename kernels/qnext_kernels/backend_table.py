"""The table of measured backends: which one was the fastest on a GPU, for an operation of certain sizes.

``backend_table.csv`` beside this module has a line for every measured case, written by
``benchmarks/write_backend_table.py`` from the results of benchmarks:

    device      the GPU's name as PyTorch gives it, or an architecture (``sm_90``, ``gfx942``) for all GPUs of it that
                have no line of their own with the same operation, method, dtype and shape
    operation   one of dispatch.OPERATION_NAMES
    method      of its backends (``prefill``)
    dtype       of the activations (``bfloat16``)
    shape       the sizes in ``Call.shape``, joined by ``x``: heads are those of one rank (``16x32x128x128``)
    tokens      of the batch that was measured; of a prefill of the delta rule those of a sequence, on average
    backend     the fastest
    ms          its time

Lines that begin with ``#`` are comments.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

PATH = Path(__file__).with_suffix(".csv")
COLUMNS = ("device", "operation", "method", "dtype", "shape", "tokens", "backend", "ms")

Key = tuple[str, str, torch.dtype, tuple[int, ...]]
"""Operation, method, dtype and shape."""


class TableError(ValueError):
    """The table cannot be read; the message names the line, what was expected and what came."""


class Measured(NamedTuple):
    """A line of the table."""

    device: str
    key: Key
    tokens: int
    backend: str
    ms: float

    def cells(self) -> tuple[str, ...]:
        """The values of :data:`COLUMNS`."""
        operation, method, dtype, shape = self.key
        sizes = "x".join(map(str, shape))
        name = str(dtype).removeprefix("torch.")
        return (self.device, operation, method, name, sizes, str(self.tokens), self.backend, f"{self.ms:.4g}")


class Table:
    """Lines, and what follows from them for calls of any number of tokens."""

    def __init__(self, lines: Iterable[Measured]) -> None:
        self.lines = tuple(lines)
        measured: dict[tuple[str, Key], dict[int, str]] = {}
        for line in self.lines:
            measured.setdefault((line.device, line.key), {})[line.tokens] = line.backend
        self._choices = {key: _by_tokens(backends) for key, backends in measured.items()}

    def fastest(self, devices: Sequence[str], key: Key, tokens: int) -> str | None:
        """The backend of the line whose number of tokens is nearest by ratio; None where there is no line.

        Args:
            devices: names that lines may have, the one that counts most first.
            key: operation, method, dtype and shape.
            tokens: of the call.
        """
        for device in devices:
            if (choice := self._choices.get((device, key))) is not None:
                limits, backends = choice
                return backends[bisect(limits, tokens)]
        return None


def _by_tokens(measured: dict[int, str]) -> tuple[list[float], list[str]]:
    """Backends by rising number of tokens, and the numbers at which one gives way to the next."""
    tokens = sorted(measured)
    limits = [math.sqrt(a * b) for a, b in pairwise(tokens)]
    return limits, [measured[count] for count in tokens]


def read(path: Path, operations: Collection[str], backends: Collection[str]) -> Table:
    """Read a table.

    Args:
        path: of the CSV.
        operations, backends: the names that there are.

    Raises:
        TableError: the file is missing or a line is wrong.
    """
    try:
        text = path.read_text().splitlines()
    except OSError as error:
        raise TableError(f"{path}: {error.strerror}") from None
    # A comment becomes an empty line, so that the lines keep their numbers.
    reader = csv.reader(["" if line.startswith("#") else line for line in text])
    lines: list[Measured] = []
    seen: set[tuple[object, ...]] = set()
    header = None
    for cells in filter(None, reader):
        where = f"{path}:{reader.line_num}"
        if header is None:
            header = tuple(cells)
            if header != COLUMNS:
                raise TableError(f"{where}: expected the columns {','.join(COLUMNS)}, got {','.join(cells)}")
            continue
        line = _parse(where, cells, operations, backends)
        case = (line.device, line.key, line.tokens)
        if case in seen:
            raise TableError(f"{where}: expected one line a case, got {','.join(line.cells()[:6])} again")
        seen.add(case)
        lines.append(line)
    if header is None:
        raise TableError(f"{path}: expected the columns {','.join(COLUMNS)}, got an empty file")
    return Table(lines)


def _parse(where: str, cells: Sequence[str], operations: Collection[str], backends: Collection[str]) -> Measured:
    if len(cells) != len(COLUMNS):
        raise TableError(f"{where}: expected {len(COLUMNS)} values, got {len(cells)}")
    device, operation, method, dtype, shape, tokens, backend, ms = cells

    def expect(fits: bool, column: str, expected: str, got: str) -> None:
        if not fits:
            raise TableError(f"{where}: {column}: expected {expected}, got {got!r}")

    expect(bool(device.strip()), "device", "a GPU's name or architecture", device)
    expect(operation in operations, "operation", f"one of {', '.join(operations)}", operation)
    expect(method.isidentifier(), "method", "the name of a method", method)
    torch_dtype = getattr(torch, dtype, None)
    expect(isinstance(torch_dtype, torch.dtype), "dtype", "a dtype of PyTorch", dtype)
    assert isinstance(torch_dtype, torch.dtype)
    sizes = shape.split("x")
    expect(all(map(_is_positive, sizes)), "shape", "positive numbers joined by x", shape)
    expect(_is_positive(tokens), "tokens", "a positive number", tokens)
    expect(backend in backends, "backend", f"one of {', '.join(backends)}", backend)
    expect(_is_time(ms), "ms", "a positive number", ms)
    key = (operation, method, torch_dtype, tuple(map(int, sizes)))
    return Measured(device, key, int(tokens), backend, float(ms))


def _is_positive(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) > 0


def _is_time(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


@cache
def device_names(index: int | None) -> tuple[str, str]:
    """What lines about this GPU may be headed by: its name, its architecture."""
    name = torch.cuda.get_device_name(index)
    if torch.version.hip is not None:
        return name, torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return name, f"sm_{major}{minor}"
