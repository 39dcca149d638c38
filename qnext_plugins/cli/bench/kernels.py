"""``qnext bench kernels``: every backend of every operation, beside the reference and what other libraries have."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qnext_kernels.dispatch import OPERATIONS, explain, force_backend
from qnext_plugins.cli.bench import engine_benches, fla_peers
from qnext_plugins.cli.bench.cases import GROUPS
from qnext_plugins.cli.bench.inputs import BF16, Case, Library, Row, Side, Sizes
from qnext_plugins.cli.bench.measure import Outcome, difference, outcome_of_ours, outcome_of_peer, seconds_of
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


class Measured(Entry):
    """One backend's time of one operation on one shape."""

    op: str
    shape: str
    backend: str
    selected: bool
    """Whether it is the one that serves."""
    threads: int
    ms: float
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

    sizes: Sizes
    ops: tuple[str, ...] = ("",)
    """Words of which an operation's name must contain one."""
    backends: tuple[str, ...] = ()
    """Only these; empty for all."""
    device: str = "cpu"
    threads: tuple[int, ...] = (1,)
    quick: bool = False
    peers: bool = True
    seconds: float = 6
    """How long the sides of a row take turns, at least."""


def libraries_for(device: str) -> tuple[list[Library], dict[str, str]]:
    """The peers that are here, and for the others why not."""
    found: list[Library] = []
    absent: dict[str, str] = {}
    sources: dict[str, Callable[[str], Library | str]] = {each.name: each.peers for each in engine_benches()}
    sources["fla"] = fla_peers.peers
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


class KernelsBench:
    """A run; ``report`` is true at any moment."""

    def __init__(self, options: Options, files: Files, progress: Progress) -> None:
        self.options, self.files, self.progress = options, files, progress
        self.device = torch.device(options.device)
        # A default device costs every call of PyTorch some microseconds: it is for making inputs, and not on a CPU.
        self.default_device = nullcontext() if options.device == "cpu" else self.device
        self.libraries, absent = libraries_for(options.device) if options.peers else ([], {})
        self.roofs = Roofs()
        self.report = KernelsReport(
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
            groups = [list(group(self.options.sizes, self.libraries)) for group in GROUPS]
        names = sorted({row.op for rows in groups for row in rows})
        for word in self.options.ops:
            if not any(word in name for name in names):
                raise ValueError(f"--ops: expected words of {', '.join(names)}, got {word!r}")
        quick = self.options.quick
        chosen = [
            [row for row in rows if any(word in row.op for word in self.options.ops) and (row.quick or not quick)]
            for rows in groups
        ]
        if not any(chosen):
            raise ValueError(f"--ops: --quick has none of {', '.join(self.options.ops)}: leave it away")
        return chosen

    def run(self) -> None:
        """Measure every row; what fails is a line of the report."""
        groups, load = self.rows(), OtherLoad()
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
                        self._one(row)
                        step()
                        self._describe(machine, load)
                    gc.collect()
        self.report.complete = True
        self.files.write(self.report)

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
        expected, sides = self._agreeing(row, case)
        if expected is None:
            return
        peers = self._agreeing_peers(row, case, expected)
        reference = sides.pop(REFERENCE, None)
        for threads in self.options.threads:
            try:
                self._time(row, case, sides, reference, peers, threads)
            except Exception as error:
                self._problem(row, f"{threads} threads", one_line(error))

    def _agreeing(self, row: Row, case: Case) -> tuple[Outcome | None, dict[str, Side]]:
        """What the definition says, or the slowest backend that is run; and the backends that say the same."""
        expected: Outcome | None = None
        sides: dict[str, Side] = {}
        for backend in reversed(self._backends(row)):
            within = partial(force_backend, f"{row.operation}={backend}")
            try:
                with within():
                    found = outcome_of_ours(case)
            except Exception as error:
                self._problem(row, backend, one_line(error))
                continue
            if expected is not None and (problem := difference(found, expected)) is not None:
                self._problem(row, backend, f"not timed; {problem} from {next(iter(sides))}")
                continue
            expected = found if expected is None else expected
            sides[backend] = Side(backend, case.ours, within=within)
        return expected, dict(reversed(sides.items()))

    def _backends(self, row: Row) -> list[str]:
        """Those to run, fastest first."""
        serving = [name for name, reason in self.report.backends[row.operation].items() if reason is None]
        wanted = [name for name in serving if not self.options.backends or name in self.options.backends]
        return [name for name in wanted if not (name == REFERENCE and row.heavy)]

    def _agreeing_peers(self, row: Row, case: Case, expected: Outcome) -> dict[str, Side]:
        peers = {}
        for library, side in case.peers.items():
            try:
                problem = difference(outcome_of_peer(case, side), expected)
            except Exception as error:
                problem = one_line(error)
            if problem is None:
                peers[library] = side
            else:
                self._problem(row, f"{library} {side.name}", f"not timed; {problem}")
        return peers

    def _time(
        self, row: Row, case: Case, sides: dict[str, Side], reference: Side | None, peers: dict[str, Side], threads: int
    ) -> None:
        seconds = self.options.seconds
        together = [*sides.values(), *peers.values()]
        timed = partial(seconds_of, threads=threads, compiled=case.compiled, device=self.options.device)
        times = timed(together, seconds=seconds, least=1 if self.options.quick else 3)
        ours = dict(zip(sides, times, strict=False))
        theirs = dict(zip(peers, times[len(sides) :], strict=True))
        if reference is not None:
            # Not in turns with the others, which it would keep from their caches and from running often.
            (ours[REFERENCE],) = timed([reference], seconds=min(seconds, 0.5), least=1)
        chosen = OPERATIONS[row.operation].select(self.device, BF16).name
        for backend, time in ours.items():
            percent = roof = None
            if case.moved is not None:
                least, roof = self.roofs.seconds(threads, case.flops, case.moved)
                percent = 100 * least / time
            self.report.rows.append(
                Measured(
                    op=row.op,
                    shape=row.shape,
                    backend=backend,
                    selected=backend == chosen,
                    threads=threads,
                    ms=time * 1e3,
                    reference_ratio=ours[REFERENCE] / time if reference is not None else None,
                    peers=[
                        PeerTime(library=name, kernel=peers[name].name, ms=other * 1e3, ratio=other / time)
                        for name, other in theirs.items()
                    ],
                    roof_percent=percent,
                    roof=roof,
                )
            )

    def _problem(self, row: Row, side: str, line: str) -> None:
        text = f"{row.op} {row.shape}, {side}: {line}"
        self.report.problems.append(text)
        self.progress.say(text)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what failed may have been too large
