"""``qnext bench kernels``: every backend of every operation, beside the reference and what other libraries have."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from pydantic import Field

from qnext_kernels.dispatch import OPERATIONS, BackendError, explain, force_backend
from qnext_plugins.cli.bench import EngineBench, engine_benches
from qnext_plugins.cli.bench.cases import GROUPS
from qnext_plugins.cli.bench.compiling import only_compiling
from qnext_plugins.cli.bench.inputs import BF16, Case, Library, Row, Side, Sizes
from qnext_plugins.cli.bench.measure import (
    Outcome,
    Timed,
    difference,
    graph_times,
    outcome_of_ours,
    outcome_of_peer,
    seconds_of,
)
from qnext_plugins.cli.bench.output import BenchReport, Files
from qnext_plugins.cli.bench.roofs import OtherLoad, Roofs, describe_machine, keep_freed_memory
from qnext_plugins.cli.compare.report import Entry
from qnext_plugins.cli.doctor.findings import one_line
from qnext_plugins.cli.progress import Progress

REFERENCE = "reference"


class PeerTime(Entry):
    """The same operation in another library."""

    library: str
    kernel: str
    ms: float
    ratio: float
    """Its time over ours."""
    one_by_one_ms: float | None = None
    """As ours."""


class Measured(Entry):
    """One backend's time of one operation on one shape."""

    op: str
    shape: str
    backend: str
    selected: bool
    """Whether it is the one that serves."""
    threads: int
    ms: float
    one_by_one_ms: float | None = None
    """Where ``ms`` is from a CUDA graph: the time of a call where Python launches one behind the other."""
    reference_ratio: float | None = None
    """The reference's time over this one; None where the reference was not timed."""
    peers: list[PeerTime]
    roof_percent: float | None = None
    """The least time that the roof allows over this one; None where the inputs stay in a cache."""
    roof: str | None = None


class KernelsReport(BenchReport):
    """All that ``qnext bench kernels`` found."""

    device: str
    backends: dict[str, dict[str, str | None]]
    """Of each operation, each backend's reason to decline (None: it serves), fastest first."""
    libraries: dict[str, str]
    """The peers: their versions."""
    absent: dict[str, str]
    """Peers that are not here, and why."""
    notes: list[str] = Field(default_factory=list)
    """What was left out or measured otherwise on purpose, a line each."""
    disagreements: list[str] = Field(default_factory=list)
    """Those of the problems where two sides have different results."""
    rows: list[Measured]

    def columns(self) -> Sequence[str]:
        peers = [f"{library}_{what}" for library in self.libraries for what in ("kernel", "ms", "ratio")]
        return ("op", "shape", "backend", "threads", "ms", "reference_ratio", *peers, "roof_pct", "roof")

    def cells(self) -> Iterator[Sequence[Any]]:
        for row in self.rows:
            peers: list[Any] = []
            for library in self.libraries:
                found = next((peer for peer in row.peers if peer.library == library), None)
                peers += [None] * 3 if found is None else [found.kernel, found.ms, found.ratio]
            measured = (row.op, row.shape, row.backend, row.threads, row.ms, row.reference_ratio)
            yield (*measured, *peers, row.roof_percent, row.roof)


@dataclass(frozen=True)
class Options:
    """How the kernels are measured."""

    sizes: dict[int, Sizes]
    """By the number of tensor-parallel ranks whose share they are."""
    first: dict[int, Sizes] = field(default_factory=dict)
    """As ``sizes``: what is measured before them."""
    measured: frozenset[tuple[str, str]] = frozenset()
    """Operations and shapes of rows that are left out because there are results of them."""
    ops: tuple[str, ...] = ("",)
    """Words of which an operation's name must contain one."""
    backends: tuple[str, ...] = ()
    """Only these; empty for all."""
    device: str = "cpu"
    threads: tuple[int, ...] = (1,)
    quick: bool = False
    peers: bool = True
    libraries: tuple[str, ...] = ()
    """Only these as peers; empty for all."""
    engines: tuple[EngineBench, ...] | None = None
    """Whose kernels are peers; None for those whose packages are installed."""
    seconds: float = 6
    """How long the sides of a row take turns, at least."""
    time_reference: bool = True
    """Whether the reference is timed too; results are compared with it in any case."""
    last_start: float = float("inf")
    """Seconds after which no further row is begun."""

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


GPU_LIBRARIES = ("fla", "flash_qla", "flashinfer", "torch")
"""Modules ``{name}_peers`` of this package with a function ``peers`` as an engine's package has it."""
COMPILED_BY_LIBRARIES = ("flashinfer", "flash_qla")
"""Backends whose kernels Triton does not compile."""


def libraries_for(device: str, engines: Sequence[EngineBench] | None = None) -> tuple[list[Library], dict[str, str]]:
    """The peers that are here, and for the others why not; ``engines``: None for those whose packages are installed."""
    found: list[Library] = []
    absent: dict[str, str] = {}
    sources: dict[str, Callable[[str], Library | str]] = {
        each.name: each.peers for each in (engine_benches() if engines is None else engines)
    }
    for name in GPU_LIBRARIES if device != "cpu" else ():
        sources[name] = import_module(f"{__package__}.{name}_peers").peers
    for name, peers in sources.items():
        try:
            library = peers(device)
        # An engine of another version, or one that is half installed, may fail in any way.
        except Exception as error:
            library = one_line(error)
        if isinstance(library, str):
            absent[name] = library
        else:
            found.append(library)
    return found, absent


class Check:
    """What the sides of a case must agree with."""

    def __init__(self, case: Case, part: Outcome | None) -> None:
        self.case, self.part = case, part
        self.expected: Outcome | None = None
        """Results and states of the whole."""

    def problem(self, found: Outcome) -> str | None:
        """How an outcome differs by more than its rounding, or None."""
        if self.expected is not None and (problem := difference(found, self.expected, self.case.tolerance)):
            return problem
        if self.part is None or self.case.part is None:
            return None
        return difference(self.case.part.of(*found), self.part, self.case.tolerance)


class KernelsBench:
    """A run; ``report`` is true at any moment."""

    def __init__(
        self, options: Options, files: Files, progress: Progress, report: type[KernelsReport] = KernelsReport
    ) -> None:
        self.options, self.files, self.progress = options, files, progress
        self.device = torch.device(options.device)
        # A default device costs every call of PyTorch some microseconds: it is for making inputs, and not on a CPU.
        self.default_device = nullcontext() if options.device == "cpu" else self.device
        found, absent = libraries_for(options.device, options.engines) if options.peers else ([], {})
        wanted = options.libraries
        self.libraries = [each for each in found if not wanted or each.name.lower() in wanted]
        self.roofs = Roofs()
        self.report = report(
            settings={"quick": options.quick, "threads": list(options.threads), "ops": list(options.ops)},
            device=options.device,
            backends=explain(self.device, BF16),
            libraries={library.name: library.version for library in self.libraries},
            absent=absent,
            rows=[],
        )

    def rows(self) -> list[list[Row]]:
        """What is to be measured, by group; raises ValueError where no operation has one of the words."""
        with self.default_device:
            first, others = (
                [list(rows) for ranks, sizes in each.items() for rows in self._groups(ranks, sizes)]
                for each in (self.options.first, self.options.sizes)
            )
        groups = first + others
        names = sorted({row.op for rows in groups for row in rows})
        for word in self.options.ops:
            if not any(word in name for name in names):
                raise ValueError(f"--ops: expected words of {', '.join(names)}, got {word!r}")
        # A GPU's shapes are chosen by its sizes.
        quick = self.options.quick and not self.options.on_gpu
        chosen = [
            [row for row in rows if any(word in row.op for word in self.options.ops) and (row.quick or not quick)]
            for rows in groups
        ]
        if not any(chosen):
            raise ValueError(f"--ops: --quick has none of {', '.join(self.options.ops)}: leave it away")
        once = self._once(chosen)
        passes = once[: len(first)], once[len(first) :]
        served = [[rows for rows in map(self._served, each) if rows] for each in passes]
        if self.options.on_gpu:
            # Peers of the delta rule tune themselves, for minutes: last, so that the time is not used up before.
            for each in served:
                each.sort(key=lambda rows: rows[0].operation == "gated_delta_rule")
        return served[0] + served[1]

    def _once(self, groups: list[list[Row]]) -> list[list[Row]]:
        """Each row where it comes first, and none that has been measured."""
        seen, once = set(self.options.measured), []
        for rows in groups:
            once.append([row for row in rows if (row.op, row.shape) not in seen])
            seen.update((row.op, row.shape) for row in rows)
        return once

    def _groups(self, ranks: int, sizes: Sizes) -> Iterator[Iterator[Row]]:
        for group in GROUPS:
            rows = group(sizes, self.libraries)
            yield rows if ranks == 1 else (replace(row, shape=f"{row.shape} tp={ranks}") for row in rows)

    def _served(self, rows: list[Row]) -> list[Row]:
        """The rows that are worth their time on a GPU: not those that only the reference can compute."""
        if not self.options.on_gpu:
            return rows
        for name in sorted({row.operation for row in rows}):
            line = f"{name}: no backend but the reference serves {self.options.device}; its rows are left out"
            if self._serving(name) == [REFERENCE] and line not in self.report.notes:
                self.report.notes.append(line)
        return [row for row in rows if self._serving(*row.operations) != [REFERENCE]]

    def _serving(self, operation: str, *parts: str) -> list[str]:
        """The backends that serve all of these, fastest first."""
        reasons = self.report.backends
        return [
            name
            for name in reasons[operation]
            if all(reasons[each].get(name, "has no such backend") is None for each in (operation, *parts))
        ]

    def run(self) -> None:
        """Measure every row; what fails is a line of the report."""
        groups, load, began = self.rows(), OtherLoad(), time.monotonic()
        keep_freed_memory()
        torch.manual_seed(0)
        with torch.inference_mode():
            with self.default_device:
                machine = describe_machine()
                self.roofs.measure(list(self.options.threads), self.options.quick)
            self._describe(machine, load)
            with self.progress.task("kernels", sum(map(len, groups)), refresh_alone=False) as step:
                while groups:
                    for row in groups.pop(0):
                        step.say(f"{row.op} {row.shape}")
                        if time.monotonic() - began < self.options.last_start:
                            self._one(row)
                        else:
                            self.report.notes.append(f"{row.op} {row.shape}: left out, the time is used up")
                        step()
                        self._describe(machine, load)
                    self._free()
        self.report.complete = True
        self.files.write(self.report)

    def compile(self, share: int, shares: int) -> None:
        """Compile this share of what the rows need, without a report: a side that fails does so again when timed."""
        groups, number = self.rows(), 0
        with torch.inference_mode(), only_compiling(share, shares):
            while groups:
                for row in groups.pop(0):
                    with suppress(Exception):
                        self._call_once(row, alone=number % shares == share)
                    number += 1
                self._free()

    def _call_once(self, row: Row, alone: bool) -> None:
        """Call every side; ``alone``: also those that do not compile with Triton, in one process only."""
        with self.default_device:
            case = row.build()
        for backend in self._backends(row):
            if backend != REFERENCE and (alone or backend not in COMPILED_BY_LIBRARIES):
                with suppress(Exception), force_backend(row.forcing(backend)):
                    case.ours(0)
        for library in self.libraries:
            if library.name in case.peers and (alone or library.compiled_by_triton):
                side = case.peers[library.name]
                with suppress(Exception), side.within():
                    side.call(0)

    def _free(self) -> None:
        """What the rows of a group have shared."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _describe(self, machine: list[str], load: OtherLoad) -> None:
        roofs = [self.roofs.describe(threads) for threads in self.options.threads]
        self.report.header = [*machine, *roofs, load.describe()]
        self.files.write(self.report)

    def _one(self, row: Row) -> None:
        try:
            with self.default_device:
                case = row.build()
        except Exception as error:
            self._problem(row, "inputs or peers", one_line(error))
            return
        check = self._check(row, case)
        sides = self._agreeing(row, case, check)
        if check.expected is None:
            return
        peers = self._agreeing_peers(row, case, check)
        reference = sides.pop(REFERENCE, None) if self.options.time_reference else None
        for threads in self.options.threads:
            try:
                self._time(row, case, sides, reference, peers, threads)
            except Exception as error:
                self._problem(row, f"{threads} threads", one_line(error))

    def _check(self, row: Row, case: Case) -> Check:
        """Before any side has run; on a GPU with what the reference says of a part where the whole takes it minutes."""
        part: Outcome | None = None
        if row.heavy and self.options.on_gpu and case.part is not None:
            try:
                with self.default_device, force_backend(row.forcing(REFERENCE)):
                    part = [tensor.clone() for tensor in case.part.ours()]
            except Exception as error:
                self._problem(row, "reference of a part", one_line(error))
        return Check(case, part)

    def _agreeing(self, row: Row, case: Case, check: Check) -> dict[str, Side]:
        """The backends that say what the definition says, or what the slowest does that is run."""
        sides: dict[str, Side] = {}
        for backend in reversed(self._backends(row)):
            within = partial(force_backend, row.forcing(backend))
            try:
                with within():
                    found = outcome_of_ours(case)
                problem = check.problem(found)
            except BackendError as error:
                self.report.notes.append(f"{row.op} {row.shape}, {backend}: {error}")
                continue
            except Exception as error:
                self._problem(row, backend, one_line(error))
                continue
            if problem is not None:
                beside = REFERENCE if check.part is not None else next(iter(sides))
                self._disagreement(row, backend, f"{problem} from {beside}")
                continue
            check.expected = found if check.expected is None else check.expected
            sides[backend] = Side(backend, case.ours, within=within)
        if not self.options.time_reference and len(self._backends(row)) > 1:
            sides.pop(REFERENCE, None)
        return dict(reversed(sides.items()))

    def _backends(self, row: Row) -> list[str]:
        """Those to run, fastest first; the reference among them wherever it is not too slow to compare with."""
        wanted = [
            name
            for name in self._serving(*row.operations)
            if not self.options.backends
            or name in self.options.backends
            or (name == REFERENCE and not self.options.time_reference)
        ]
        return [name for name in wanted if not (name == REFERENCE and row.heavy) and name not in row.borrowed]

    def _agreeing_peers(self, row: Row, case: Case, check: Check) -> dict[str, Side]:
        peers = {}
        for library, side in case.peers.items():
            try:
                problem = check.problem(outcome_of_peer(case, side))
            except Exception as error:
                self._problem(row, f"{library} {side.name}", f"not timed; {one_line(error)}")
                continue
            if problem is None:
                peers[library] = side
            else:
                self._disagreement(row, f"{library} {side.name}", problem)
        return peers

    def _time(
        self, row: Row, case: Case, sides: dict[str, Side], reference: Side | None, peers: dict[str, Side], threads: int
    ) -> None:
        seconds, least = self.options.seconds, 1 if self.options.quick else 3
        together = [*sides.values(), *peers.values()]
        timed = partial(seconds_of, threads=threads, compiled=case.compiled, device=self.options.device)
        if row.stepped and self.device.type == "cuda":
            times = graph_times(together, case.sets, seconds, least)
        else:
            times = [Timed(each) for each in timed(together, seconds=seconds, least=least)]
        ours = dict(zip(sides, times, strict=False))
        theirs = dict(zip(peers, times[len(sides) :], strict=True))
        self._note_what_graphs_cannot_hold(row, ours, {f"{name} {peers[name].name}": theirs[name] for name in peers})
        if reference is not None:
            # Not in turns with the others, which it would keep from their caches and from running often.
            (alone,) = timed([reference], seconds=min(seconds, 0.5), least=1)
            ours[REFERENCE] = Timed(alone)
        chosen = {OPERATIONS[name].select(self.device, BF16).name for name in row.operations}
        for backend, took in ours.items():
            percent = roof = None
            if case.moved is not None:
                least_time, roof = self.roofs.seconds(threads, case.flops, case.moved, case.compute)
                percent = 100 * least_time / took.seconds
            self.report.rows.append(
                Measured(
                    op=row.op,
                    shape=row.shape,
                    backend=backend,
                    selected=chosen == {backend},
                    threads=threads,
                    ms=took.seconds * 1e3,
                    one_by_one_ms=_milliseconds(took.one_by_one),
                    reference_ratio=ours[REFERENCE].seconds / took.seconds if reference is not None else None,
                    peers=[
                        PeerTime(
                            library=name,
                            kernel=peers[name].name,
                            ms=other.seconds * 1e3,
                            ratio=other.seconds / took.seconds,
                            one_by_one_ms=_milliseconds(other.one_by_one),
                        )
                        for name, other in theirs.items()
                    ],
                    roof_percent=percent,
                    roof=roof,
                )
            )

    def _note_what_graphs_cannot_hold(self, row: Row, ours: dict[str, Timed], theirs: dict[str, Timed]) -> None:
        for backend, timed in ours.items():
            if timed.note is not None:
                self._problem(row, backend, timed.note)
        self.report.notes += [
            f"{row.op} {row.shape}, {name}: {timed.note}" for name, timed in theirs.items() if timed.note is not None
        ]

    def _disagreement(self, row: Row, side: str, line: str) -> None:
        self._problem(row, side, f"not timed; {line}")
        self.report.disagreements.append(self.report.problems[-1])

    def _problem(self, row: Row, side: str, line: str) -> None:
        text = f"{row.op} {row.shape}, {side}: {line}"
        self.report.problems.append(text)
        self.progress.say(text)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what failed may have been too large


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
