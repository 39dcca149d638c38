"""Runs a comparison: starts the sides, asks them, lets them read each other, and keeps what it has at any moment."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qnext_plugins import __version__
from qnext_plugins.cli.compare.analysis import compare_all
from qnext_plugins.cli.compare.answers import SideError
from qnext_plugins.cli.compare.client import Client, drafts_between
from qnext_plugins.cli.compare.fitting import fitting
from qnext_plugins.cli.compare.performance import MOST_FAILURES, measure
from qnext_plugins.cli.compare.report import Key, Prompt, Report, Score, Side
from qnext_plugins.cli.compare.rounding import UNKNOWN, dtypes_to_read
from qnext_plugins.cli.compare.servers import Server, has_accelerator, installed
from qnext_plugins.cli.compare.sides import Pythons, SideSpec
from qnext_plugins.cli.compare.verdict import choose_referee, conclude
from qnext_plugins.cli.progress import Progress


@dataclass(frozen=True)
class Options:
    """How a comparison is made; the defaults are the command line's."""

    prompts: Sequence[Prompt]
    max_tokens: int = 64
    concurrency: tuple[int, ...] = (1, 4)
    requests: int = 16
    speed: bool = True
    referee: str | None = None
    tie_gap: float | None = None
    tolerance: float | None = None
    pythons: Pythons = field(default_factory=Pythons)
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 300
    start_timeout: float = 600
    one_at_a_time: bool = False
    output: Path = Path("qnext-compare")

    def settings(self) -> dict[str, Any]:
        """What the report says of them; no key."""
        names = ("max_tokens", "concurrency", "requests", "speed", "tie_gap", "tolerance", "timeout", "one_at_a_time")
        return {name: getattr(self, name) for name in names}


class Running:
    """A side while the comparison runs."""

    def __init__(self, spec: SideSpec, options: Options, beside: int) -> None:
        """``beside``: how many sides that we start run at once."""
        self.spec = spec
        self.options = options
        self.beside = beside
        # What a URL leads to is known only once it has answered.
        kind = spec.kind if spec.started else "openai"
        self.side = Side(name=spec.name, spec=spec.spec, kind=kind, without_drafts_of=spec.without_drafts_of)
        self.server: Server | None = None
        self.client: Client | None = None
        self.lost = False
        """Whether it is given up: it did not start, or it ended."""

    async def launch(self) -> None:
        """Start the server, without waiting for it; a URL needs nothing."""
        if not self.spec.started or self.server is not None:
            return
        python = self.options.pythons.of(self.spec.kind)
        self.side.versions = await installed(self.spec, python)
        fits = fitting(self.spec, self.beside, on_cpu=self.spec.kind != "hf" and not await has_accelerator(python))
        if fits.line is not None:
            self.note(fits.line)
        self.server = Server(self.spec, python, self.options.output / f"{self.spec.name}.log", fits.flags)
        self.side.command, self.side.log = self.server.command, str(self.server.log)

    async def connect(self) -> None:
        """Wait for the server and find out what it is."""
        if self.client is not None:
            return
        if self.server is not None:
            await self.server.ready(self.options.start_timeout)
        self.side.url = url = self.server.url if self.server is not None else self.spec.target
        api_key = None if self.spec.started else self.options.api_key
        self.client = Client(url, api_key=api_key, timeout=self.options.timeout)
        about = await self.client.about(None if self.spec.started else self.options.model)
        self.side.kind, self.side.model = about.kind, about.model
        self.side.versions |= about.versions
        self.side.dtype = about.dtype or self.side.dtype or self.spec.dtype
        if self.server is not None:
            self.side.served_by, logged = self.server.served()
            self.side.dtype = logged or self.side.dtype

    async def close(self) -> None:
        """End the connection and the server; the side can be launched again."""
        client, server = self.client, self.server
        self.client = self.server = None
        if client is not None:
            await client.close()
        if server is not None:
            await asyncio.to_thread(server.stop)

    def problem(self, line: str) -> None:
        self.side.problems.append(line)

    def note(self, line: str) -> None:
        if line not in self.side.notes:
            self.side.notes.append(line)

    def check_alive(self) -> None:
        """Give the side up, once, if its server has ended."""
        if not self.lost and self.server is not None and (end := self.server.ended()) is not None:
            self.lost = True
            self.problem(end)


class Comparison:
    """A comparison; ``report`` is true at any moment, complete after ``run``."""

    def __init__(self, specs: Iterable[SideSpec], options: Options, progress: Progress) -> None:
        self.options = options
        self.progress = progress
        specs = list(specs)
        beside = 1 if options.one_at_a_time else sum(spec.started for spec in specs)
        self.running = [Running(spec, options, beside) for spec in specs]
        self.interrupted = False

    async def run(self) -> None:
        """Ask all sides; whatever a side does not do is a line in its part of the report."""
        try:
            if not self.options.one_at_a_time:
                await self._start_all()
            for running in self.running:
                await self._phase(running, self._ask)
            for running in self.running:
                await self._phase(running, self._read)
        except asyncio.CancelledError:
            self.interrupted = True
            raise
        finally:
            for running in self.running:
                if running.client is not None:
                    await running.client.close()
            self.stop()

    def stop(self) -> None:
        """End every server that is still there; without waiting for the loop, which may be ending."""
        servers = [running.server for running in self.running if running.server is not None]
        if not servers:
            return
        self.progress.say("ending the servers that were started")
        with ThreadPoolExecutor() as pool:
            list(pool.map(Server.stop, servers))
        for running in self.running:
            running.server = None

    async def _start_all(self) -> None:
        """Start every server at once and wait for all: one that starts would disturb the times of another."""
        for running in self.running:
            await self._step(running, running.launch)
        for running in self.running:
            log = f", log: {running.side.log}" if running.side.log and not running.lost else ""
            self.progress.say(f"waiting for {running.spec.name}{log}")
            await self._step(running, running.connect)

    async def _phase(self, running: Running, work: Callable[[Running, Client], Awaitable[None]]) -> None:
        """Do ``work`` with a connected side."""
        for step in (running.launch, running.connect):
            await self._step(running, step)
        if running.lost or running.client is None:
            return
        await work(running, running.client)
        running.check_alive()
        if self.options.one_at_a_time:
            await running.close()

    async def _step(self, running: Running, step: Callable[[], Awaitable[None]]) -> None:
        if running.lost:
            return
        try:
            await step()
        except SideError as error:
            running.lost = True
            running.problem(str(error))
            self.progress.say(f"{running.spec.name}: {error}")

    async def _ask(self, running: Running, client: Client) -> None:
        """Greedy continuations, then performance."""
        options = self.options

        async def ask(number: int) -> None:
            running.side.answers.append(await client.greedy(number, options.prompts[number], options.max_tokens))

        todo = {f"prompt {number}": number for number in range(len(options.prompts))}
        running.side.problems += await self._each(running, "greedy", todo, ask)
        running.side.answers.sort(key=lambda answer: answer.prompt)
        if any(answer.ids is None for answer in running.side.answers):
            texts = all(answer.texts is not None for answer in running.side.answers)
            by = "the texts of its tokens" if texts else "characters"
            running.note(f"gives no token ids: it is compared by {by}, and what it said is scored by nobody")
        elif running.side.dtype is None:
            running.note(f"does not say what it computes in: taken for {UNKNOWN}")
        if any(answer.log_probs is None for answer in running.side.answers):
            running.note("gives no log-probabilities: where it parts nobody can say whether that is a tie")
        if options.speed and not running.lost and running.side.answers:
            await self._time(running, client)

    async def _time(self, running: Running, client: Client) -> None:
        if client.kind == "hf":
            running.note("performance is not measured: transformers is here to referee")
            return
        options = self.options
        try:
            before = await client.counters()
            for concurrency in options.concurrency:
                with self.progress.task(f"{running.spec.name}: {concurrency} at a time", options.requests) as advance:
                    level, failures = await measure(
                        client,
                        options.prompts,
                        concurrency=concurrency,
                        requests=options.requests,
                        max_tokens=options.max_tokens,
                        done=advance,
                    )
                running.side.levels += [level] if level is not None else []
                running.side.problems += failures
            # The last step's counters may come a moment after its tokens.
            await asyncio.sleep(1)
            running.side.drafts = drafts_between(client.kind, before, await client.counters())
        except SideError as error:
            running.problem(f"performance: {error}")

    async def _read(self, running: Running, client: Client) -> None:
        """Scores of everything that any side said; of the referee in other dtypes too, where they measure rounding."""
        if client.kind == "openai":
            running.note("offers no way to score given tokens")
            return
        running.side.problems += await self._score(running, client, running.side.scores)
        sides = [each.side for each in self.running]
        if running.lost or running.spec.name != choose_referee(sides, self.options.referee):
            return
        readings: dict[str, list[Score]] = {}
        for dtype in dtypes_to_read(sides, running.side):
            failures = await self._score(running, client, readings.setdefault(dtype, []), dtype)
            if failures:
                running.note(f"does not measure rounding: {failures[0]}")
                return
        running.side.readings = readings

    async def _score(
        self, running: Running, client: Client, scores: list[Score], dtype: str | None = None
    ) -> list[str]:
        """Append each continuation's score, computed in ``dtype`` if not the side's own; a line for each failure."""

        async def read(score: Score) -> None:
            score.log_probs, score.gaps = await client.score(score.prompt_ids, score.ids, dtype)
            scores.append(score)

        what = "reading" if dtype is None else f"reading in {dtype}"
        failures = await self._each(running, what, self._continuations(), read)
        scores.sort(key=lambda score: (score.prompt, score.author))
        return failures

    def _continuations(self) -> dict[str, Score]:
        """Every distinct continuation, not yet scored."""
        found: dict[Key, Score] = {}
        for side in (running.side for running in self.running):
            for answer in side.answers:
                if answer.key is not None and answer.key not in found:
                    prompt, prompt_ids, ids = answer.key
                    found[answer.key] = Score(
                        prompt=prompt,
                        prompt_ids=list(prompt_ids),
                        ids=list(ids),
                        author=side.name,
                        texts=answer.texts,
                        log_probs=[],
                        gaps=[],
                    )
        return {f"prompt {score.prompt} of {score.author}": score for score in found.values()}

    async def _each(
        self, running: Running, what: str, todo: dict[str, Any], work: Callable[[Any], Awaitable[None]]
    ) -> list[str]:
        """Do ``work`` for each of ``todo``, a few at a time; a line for each failure, after three in a row it stops."""
        waiting = iter(todo.items())
        failures: list[str] = []
        in_a_row = done = 0

        async def worker() -> None:
            nonlocal in_a_row, done
            for name, item in waiting:
                if in_a_row >= MOST_FAILURES or running.lost:
                    return
                try:
                    await work(item)
                    in_a_row = 0
                    done += 1
                except SideError as error:
                    in_a_row += 1
                    failures.append(f"{what}, {name}: {error}")
                    running.check_alive()
                advance()

        with self.progress.task(f"{running.spec.name}: {what}", len(todo)) as advance:
            async with asyncio.TaskGroup() as group:
                for _ in range(max(self.options.concurrency)):
                    group.create_task(worker())
        if (left := len(todo) - done - len(failures)) > 0:
            failures.append(f"{what}: {left} prompts were not asked after that")
        return failures

    def report(self) -> Report:
        """What there is by now, compared."""
        options = self.options
        sides = [running.side.model_copy(deep=True) for running in self.running]
        referee = choose_referee(sides, options.referee)
        report = Report(
            made_at=datetime.now().astimezone().isoformat(timespec="seconds"),
            versions={"qnext-plugins": __version__, "python": platform.python_version()} | _tools(),
            machine={
                "system": platform.platform(),
                "processor": platform.machine(),
                "cores": str(len(os.sched_getaffinity(0))),
            },
            settings=options.settings(),
            prompts=list(options.prompts),
            sides=sides,
            pairs=compare_all(sides, referee=referee, tie_gap=options.tie_gap, tolerance=options.tolerance),
            referee=referee,
            interrupted=self.interrupted,
        )
        conclude(report)
        return report


def _tools() -> dict[str, str]:
    """Versions of what measures."""
    versions = {}
    for name in ("httpx", "matplotlib"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def make(specs: Iterable[SideSpec], options: Options, progress: Progress) -> Report:
    """Run a comparison and report it; an interrupt ends it early and leaves a report of what there was."""
    comparison = Comparison(specs, options, progress)
    start = time.monotonic()
    try:
        asyncio.run(comparison.run())
    except KeyboardInterrupt:
        comparison.interrupted = True
    finally:
        comparison.stop()
    report = comparison.report()
    report.settings["seconds"] = round(time.monotonic() - start, 1)
    return report
