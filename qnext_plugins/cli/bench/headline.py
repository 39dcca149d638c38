"""``qnext bench headline``: the release's claims, Qwen3-Next-80B-A3B against Qwen3-32B, from slices at real widths.

Both slices are in memory at once and take turns. A step is timed with its decoder layers and without them (the same
engine, with a stub in their place): the difference is the layers', and grows with the depth; the rest (head, sampling,
scheduling) does not. What comes before the tokens that are timed is fed without the layers, so that a long context
costs no long prefill; a chunk's time is linear in the tokens before it, and a prompt's is the sum over its chunks.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from qnext_plugins.cli.bench import engine_benches
from qnext_plugins.cli.bench.models import DenseSlice, Qwen32B, QwenNext, Slice, Work
from qnext_plugins.cli.bench.output import BenchReport, Files
from qnext_plugins.cli.bench.roofs import OtherLoad, Roofs, describe_machine
from qnext_plugins.cli.bench.stepped import EngineError, EngineProcess
from qnext_plugins.cli.compare.report import Entry
from qnext_plugins.cli.progress import Progress, Step

Phase = Literal["prefill", "decode"]
CLAIMS: dict[tuple[Phase, bool], str] = {
    ("prefill", False): "7",
    ("prefill", True): "> 10",
    ("decode", False): "4",
    ("decode", True): "> 10",
}
"""Of the release: throughput over Qwen3-32B's, at 4 K and from 32 K on."""
CLAIMED_AT, CLAIMED_FROM = 4096, 32768
DECODE_STEPS = 4
"""Of one engine before it is the other's turn."""
BELIEVABLE = 1.25
"""Times the bandwidth; what seems faster was measured while something else took the machine."""


class Side(Entry):
    """One model's times at a context."""

    model: str
    layers_ms: float
    """Of all the slice's layers: in decode of a step, in prefill of the prompt."""
    rest_ms: float
    """Of a step without its layers."""
    slice_layers: int
    depth: int
    total_ms: float
    """At full depth: of a step, or of the prompt."""
    tokens_per_second: float


class Ratio(Entry):
    """The two models at one context."""

    phase: Phase
    context: int
    batch: int
    next: Side
    dense: Side
    ratio: float
    """Of the tokens a second at full depth."""
    claim: str | None
    """The release's; None between and below its contexts."""
    predicted: float
    """What the FLOP of a prefill, or the bytes of a decode step, allow alone."""


class HeadlineReport(BenchReport):
    """All that ``qnext bench headline`` found."""

    served_by: dict[str, str] = Field(default_factory=dict)
    """Of each model, the class that served it."""
    rows: list[Ratio] = Field(default_factory=list)

    def columns(self) -> Sequence[str]:
        sides = [f"{side}_{what}" for side in ("next", "dense") for what in ("layers_ms", "rest_ms", "tokens_per_s")]
        return ("phase", "context", "batch", *sides, "ratio", "claim", "predicted")

    def cells(self) -> Iterator[Sequence[Any]]:
        for row in self.rows:
            sides = [
                value
                for side in (row.next, row.dense)
                for value in (side.layers_ms, side.rest_ms, side.tokens_per_second)
            ]
            yield (row.phase, row.context, row.batch, *sides, row.ratio, row.claim, row.predicted)


@dataclass(frozen=True)
class Options:
    """How the two are measured; the defaults are the command line's."""

    contexts: tuple[int, ...] = (CLAIMED_AT, CLAIMED_FROM)
    batches: tuple[int, ...] = (1,)
    layers: int = 4
    dense_layers: int = 1
    experts: int = 512
    vocabulary: int = 151936
    chunk: int = 2048
    threads: int = 1
    rounds: int = 3
    quick: bool = False
    eager: bool = False
    phases: tuple[Phase, ...] = ("prefill", "decode")
    logs: Path = field(default_factory=lambda: Path("qnext-bench"))

    def settings(self) -> dict[str, Any]:
        names = ("layers", "dense_layers", "experts", "vocabulary", "chunk", "threads", "rounds", "quick", "eager")
        return {name: getattr(self, name) for name in names}


@dataclass
class Model:
    """A model in this comparison: its slice's engine, and its work at full depth."""

    work: Work
    layers: int
    engine: EngineProcess


class HeadlineBench:
    """A run; ``report`` is true at any moment."""

    def __init__(self, options: Options, files: Files, progress: Progress) -> None:
        self.options, self.files, self.progress = options, files, progress
        self.report = HeadlineReport(settings=options.settings())
        self.models: list[Model] = []
        self.roofs = Roofs()

    def run(self) -> None:
        """Measure every context; what fails is a line of the report."""
        machine, load = describe_machine(), OtherLoad()
        threads = self.options.threads
        self.roofs.measure([threads], quick=True)
        self._header = lambda: [*machine, self._sizes(), self.roofs.describe(threads), load.describe()]
        self.report.header = self._header()
        try:
            self._start()
            batches = len(self.options.batches) * ("decode" in self.options.phases)
            total = len(self.options.contexts) * (("prefill" in self.options.phases) + batches)
            with self.progress.task("headline", total, refresh_alone=False) as step:
                self._measure(step)
            self.report.complete = True
        except EngineError as error:
            self.report.problems.append(str(error))
        finally:
            for model in self.models:
                model.engine.stop()
            self.report.header = self._header()
            self.files.write(self.report)

    @property
    def _rounds(self) -> int:
        return 1 if self.options.quick else self.options.rounds

    def _sizes(self) -> str:
        o = self.options
        return (
            f"slices: {o.layers} layers of Qwen3-Next-80B-A3B with {o.experts} experts, {o.dense_layers} of Qwen3-32B; "
            f"vocabulary {o.vocabulary}, bfloat16, chunks of {o.chunk}, {o.threads} threads"
        )

    def _start(self) -> None:
        """Start both engines, one after the other: both at once would want twice the memory of a start."""
        o = self.options
        engine = next((each.engine for each in engine_benches() if each.engine is not None), None)
        if engine is None:
            raise EngineError("no engine in this environment can run layer slices: install vLLM beside qnext-plugins")
        o.logs.mkdir(parents=True, exist_ok=True)
        next_slice, dense_slice = Slice(o.layers, o.experts, o.vocabulary), DenseSlice(o.dense_layers, o.vocabulary)
        chosen: list[tuple[Work, Slice | DenseSlice, str]] = [
            (QwenNext(vocabulary=o.vocabulary), next_slice, "qwen3-next"),
            (Qwen32B(vocabulary=o.vocabulary), dense_slice, "qwen3-32b"),
        ]
        # Whole chunks of a prompt, and room for what is decoded behind it.
        longest = -(-max(o.contexts) // o.chunk) * o.chunk + 512
        for work, cut, name in chosen:
            self.progress.say(f"starting {work.name}")
            settings = {
                "config": cut.config(),
                "threads": o.threads,
                "chunk": o.chunk,
                "max_tokens": longest,
                "batch": max(o.batches),
                "cache_bytes": max(o.batches) * cut.cache_bytes(longest) + (256 << 20),
                "eager": o.eager,
            }
            process = EngineProcess.spawn(work.name, o.logs / f"{name}.log", engine, settings)
            self.models.append(Model(work, cut.layers, process))
            process.wait()
            self.report.served_by[work.name] = process.ask("architecture")

    def _measure(self, step: Step) -> None:
        step.say("warming up")
        for model in self.models:
            model.engine.ask("prefill", 0, True)
        for context in self.options.contexts:
            if "prefill" in self.options.phases:
                step.say(f"prefill {context}")
                self._add("prefill", context, 1, self._prefill(context))
                step()
            for batch in self.options.batches if "decode" in self.options.phases else ():
                step.say(f"decode {context}, {batch} at a time")
                self._add("decode", context, batch, self._decode(context, batch))
                step()

    def _prefill(self, context: int) -> list[tuple[float, float]]:
        """Of each model: seconds of the layers over a whole prompt, and of a step without them."""
        offsets = chunk_offsets(context, self.options.chunk)
        layers: list[dict[int, float]] = [{} for _ in self.models]
        rest: list[list[float]] = [[] for _ in self.models]
        for offset in offsets:
            full: list[list[float]] = [[] for _ in self.models]
            without: list[list[float]] = [[] for _ in self.models]
            for _ in range(self._rounds):
                for n, model in enumerate(self.models):
                    times = [model.engine.ask("prefill", offset, with_layers) for with_layers in (True, False)]
                    full[n].append(times[0])
                    without[n].append(times[1])
            for n in range(len(self.models)):
                rest[n].append(statistics.median(without[n]))
                layers[n][offset] = statistics.median(full[n]) - rest[n][-1]
        chunks = range(0, context, self.options.chunk)
        return [
            (sum(interpolate(seen, offset) for offset in chunks), statistics.median(without))
            for seen, without in zip(layers, rest, strict=True)
        ]

    def _decode(self, context: int, batch: int) -> list[tuple[float, float]]:
        """Of each model: seconds of the layers of a step, and of a step without them."""
        full: list[list[float]] = [[] for _ in self.models]
        without: list[list[float]] = [[] for _ in self.models]
        for model in self.models:
            model.engine.ask("begin_decode", batch, context)
        # The first turn warms up, and does not count.
        for turn in range(1 + max(4, 2 * self._rounds)):
            for n, model in enumerate(self.models):
                times = [model.engine.ask("decode", DECODE_STEPS, with_layers) for with_layers in (True, False)]
                if turn:
                    full[n] += times[0]
                    without[n] += times[1]
        for model in self.models:
            model.engine.ask("end_decode")
        return [
            (statistics.median(with_layers) - statistics.median(rest), statistics.median(rest))
            for with_layers, rest in zip(full, without, strict=True)
        ]

    def _check(self, context: int, batch: int, work: Work, seconds: float) -> None:
        """A line where a step is faster than memory can be, as a difference of two disturbed times may be."""
        least = work.decode_bytes(context, batch) / self.roofs.bandwidth[self.options.threads]
        if seconds * BELIEVABLE < least:
            self.report.problems.append(
                f"decode {context}, {work.name}: {seconds * 1e3:.4g} ms are less than the {least * 1e3:.4g} that "
                "memory allows: the machine was disturbed, measure again"
            )

    def _add(self, phase: Phase, context: int, batch: int, times: list[tuple[float, float]]) -> None:
        tokens = context if phase == "prefill" else batch
        sides = []
        for model, (layers, rest) in zip(self.models, times, strict=True):
            total = layers * model.work.depth / model.layers + rest
            if phase == "decode":
                self._check(context, batch, model.work, total)
            sides.append(
                Side(
                    model=model.work.name,
                    layers_ms=layers * 1e3,
                    rest_ms=rest * 1e3,
                    slice_layers=model.layers,
                    depth=model.work.depth,
                    total_ms=total * 1e3,
                    tokens_per_second=tokens / total,
                )
            )
        ours, dense = sides
        works = [model.work for model in self.models]
        if phase == "prefill":
            costs = [work.prefill_flops(context) for work in works]
        else:
            costs = [work.decode_bytes(context, batch) for work in works]
        long = context >= CLAIMED_FROM
        self.report.rows.append(
            Ratio(
                phase=phase,
                context=context,
                batch=batch,
                next=ours,
                dense=dense,
                ratio=ours.tokens_per_second / dense.tokens_per_second,
                claim=CLAIMS[phase, long] if long or context == CLAIMED_AT else None,
                predicted=costs[1] / costs[0],
            )
        )
        self.report.header = self._header()
        self.files.write(self.report)


def chunk_offsets(context: int, chunk: int) -> list[int]:
    """Where the chunks begin that are timed: the first, the middle and the last of a prompt."""
    last = context // chunk - 1
    return sorted({0, last // 2 * chunk, last * chunk})


def interpolate(seen: dict[int, float], at: int) -> float:
    """The value at ``at`` on the lines between what was seen."""
    below = max(offset for offset in seen if offset <= at)
    above = min(offset for offset in seen if offset >= at)
    if below == above:
        return seen[below]
    return seen[below] + (seen[above] - seen[below]) * (at - below) / (above - below)
