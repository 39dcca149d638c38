"""``qnext bench serve``: one server under growing load, by the benchmark that comes with an engine."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from qnext_plugins.cli.bench.output import BenchReport, Files
from qnext_plugins.cli.bench.tools import Level, Load, ToolError, command, progress, read_result
from qnext_plugins.cli.compare.answers import SideError
from qnext_plugins.cli.compare.client import Client, drafts_between
from qnext_plugins.cli.compare.logs import root_cause
from qnext_plugins.cli.compare.servers import Server, installed
from qnext_plugins.cli.compare.sides import Pythons, SideSpec
from qnext_plugins.cli.progress import Progress, Step
from qnext_plugins.server_process import end_group

TOOLS = {"vllm": "vllm bench serve", "sglang": "sglang.bench_serving"}
TIMES = ("mean", "p50", "p99")


class ServeReport(BenchReport):
    """All that ``qnext bench serve`` found."""

    target: str
    tool: str | None = None
    url: str | None = None
    model: str | None = None
    kind: str | None = None
    """What serves: ``vllm``, ``sglang`` or ``openai``."""
    versions: dict[str, str] = Field(default_factory=dict)
    served_by: str | None = None
    """The plugin's own line in the log of a server that was started."""
    commands: list[list[str]] = Field(default_factory=list)
    """Of the server, if it was started, and of the tool at each level."""
    levels: list[Level] = Field(default_factory=list)

    def columns(self) -> Sequence[str]:
        times = [f"{name}_{what}_ms" for name in ("ttft", "itl", "tpot") for what in TIMES]
        counts = ("concurrency", "requests", "completed", "seconds", "input_tokens", "output_tokens")
        return (*counts, "output_tokens_per_s", *times, "accepted_length")

    def cells(self) -> Iterator[Sequence[Any]]:
        for level in self.levels:
            each = (level.first_token, level.inter_token, level.time_per_token)
            counts = (level.concurrency, level.requests, level.completed, level.seconds)
            tokens = (level.input_tokens, level.output_tokens, level.output_tokens_per_second)
            times = [getattr(of, what) for of in each for what in TIMES]
            yield (*counts, *tokens, *times, level.accepted_length)


@dataclass(frozen=True)
class Options:
    """How a server is measured; the defaults are the command line's."""

    tool: str | None = None
    concurrency: tuple[int, ...] = (1, 4, 16)
    requests: int = 32
    input_tokens: int = 256
    output_tokens: int = 64
    model: str | None = None
    tokenizer: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 1800
    start_timeout: float = 600
    pythons: Pythons = field(default_factory=Pythons)
    output: Path = Path("qnext-bench")

    def settings(self) -> dict[str, Any]:
        """What the report says of them; no key."""
        names = ("concurrency", "requests", "input_tokens", "output_tokens", "tokenizer", "timeout")
        return {name: getattr(self, name) for name in names}


def tool_here() -> str | None:
    """The tool of the engine in this environment."""
    return next((tool for tool in TOOLS if importlib.util.find_spec(tool) is not None), None)


class ServeBench:
    """A run; ``report`` is true at any moment."""

    def __init__(self, spec: SideSpec, options: Options, files: Files, progress: Progress) -> None:
        self.spec, self.options, self.files, self.progress = spec, options, files, progress
        self.report = ServeReport(target=spec.spec, settings=options.settings())
        self.server: Server | None = None
        self._tool_process: subprocess.Popen | None = None

    def run(self) -> None:
        """Measure every level; what fails is a line of the report, and what was measured before stays."""
        try:
            asyncio.run(self._run())
        except (SideError, ToolError) as error:
            self._problem(str(error))
        finally:
            self._stop()

    async def _run(self) -> None:
        tool = self._tool()
        python = self.options.pythons.of(tool)
        # What is asked of the environment first costs nothing: a start that cannot be measured is not made.
        self.report.versions = await installed(SideSpec(tool, tool, tool, ""), python)
        await self._start()
        about = await self._about()
        self.report.model, self.report.kind = about
        levels = list(self.options.concurrency)
        while levels:
            concurrency = levels.pop(0)
            try:
                await self._level(tool, python, concurrency)
            except ToolError as error:
                self._problem(f"{concurrency} at a time: {error}")
                if await self._gone() or not self.report.levels:
                    break
        if levels:
            self._problem(f"{', '.join(map(str, levels))} at a time: not measured after that")
        self.report.complete = not levels
        self.files.write(self.report)

    def _tool(self) -> str:
        kind = self.spec.kind if self.spec.started else None
        tool = self.options.tool or kind or tool_here()
        if tool is None:
            raise ToolError("neither vLLM nor SGLang is in this environment: give --tool, and --python-vllm or -sglang")
        self.report.tool = TOOLS[tool]
        return tool

    async def _start(self) -> None:
        """Start the server if it is ours, and wait until it serves."""
        if not self.spec.started:
            self.report.url = self.spec.target
            return
        python = self.options.pythons.of(self.spec.kind)
        await installed(self.spec, python)
        self.server = Server(self.spec, python, self.options.output / f"{self.spec.name}.log")
        self.report.url = self.server.url
        self.report.commands.append(self.server.command)
        self.progress.say(f"waiting for {self.spec.name}")
        await self.server.ready(self.options.start_timeout)
        self.report.served_by = self.server.served()[0]

    async def _about(self) -> tuple[str, str]:
        """The model and the kind of server; raises SideError if it does not serve the model that was asked for."""
        client = self._client()
        try:
            about = await client.about(self.options.model)
            if about.model not in client.served:
                raise SideError(f"--model: {client.url} serves {', '.join(client.served)}, got {about.model!r}")
        finally:
            await client.close()
        return about.model, about.kind

    def _client(self) -> Client:
        assert self.report.url is not None
        return Client(self.report.url, api_key=self.options.api_key, timeout=10)

    async def _counters(self) -> dict[str, float]:
        """The server's own counters; empty where it has none or no longer answers."""
        client = self._client()
        try:
            return await client.counters()
        except SideError:
            return {}
        finally:
            await client.close()

    async def _gone(self) -> bool:
        """Whether the server has ended, with a line that says so."""
        if self.server is not None and (end := self.server.ended()) is not None:
            self._problem(end)
            return True
        try:
            await self._about()
        except SideError as error:
            self._problem(str(error))
            return True
        return False

    async def _level(self, tool: str, python: str, concurrency: int) -> None:
        """Let the tool put one load on the server; raises ToolError if nothing of it was measured."""
        options = self.options
        assert self.report.url is not None
        assert self.report.model is not None
        load = Load(
            url=self.report.url,
            server=self.report.kind or "openai",
            model=self.report.model,
            tokenizer=options.tokenizer or (self.spec.target if self.spec.started else self.report.model),
            input_tokens=options.input_tokens,
            output_tokens=options.output_tokens,
            requests=max(options.requests, concurrency),
            concurrency=concurrency,
        )
        options.output.mkdir(parents=True, exist_ok=True)
        result = options.output.absolute() / f"{tool}-{concurrency}.json"
        result.unlink(missing_ok=True)
        line = command(tool, python, load, result)
        self.report.commands.append(line)
        before = await self._counters()
        with self.progress.task(f"{TOOLS[tool]}: {concurrency} at a time", load.requests) as step:
            ended = await self._tool_runs(line, result.with_suffix(".log"), load.requests, step)
        if not result.is_file():
            raise ToolError(ended or f"{TOOLS[tool]} wrote no result (log: {result.with_suffix('.log')})")
        level, error = read_result(tool, result.read_text(), load)
        if level.completed == 0:
            raise ToolError(f"none of {level.requests} requests succeeded: {error or 'the tool does not say why'}")
        if level.accepted_length is None and load.server in TOOLS:
            drafts = drafts_between(load.server, before, await self._counters())
            level.accepted_length = drafts.accepted_length if drafts is not None else None
        self.report.levels.append(level)
        self.files.write(self.report)
        if level.failed:
            why = error or ended or "the tool does not say why"
            raise ToolError(f"{level.failed} of {level.requests} requests failed: {why}")

    async def _tool_runs(self, line: list[str], log: Path, requests: int, step: Step) -> str | None:
        """Run a tool to its end; a line about its end unless that was a good one."""
        # Tokenizers are local; a proxy of the environment must not come between the tool and the server.
        own = {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
        if self.options.api_key:
            own["OPENAI_API_KEY"] = self.options.api_key
        deadline, done = time.monotonic() + self.options.timeout, 0
        with log.open("w") as output:
            process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | own,
            )
        self._tool_process = process
        try:
            while process.poll() is None:
                await asyncio.sleep(0.2)
                seen = progress(log.read_text(errors="replace"), requests)
                for _ in range(seen - done):
                    step()
                done = max(done, seen)
                if time.monotonic() > deadline:
                    return f"stopped after {self.options.timeout:g} s (--timeout)"
        finally:
            self._end_tool()
        if process.returncode:
            return f"the tool ended with status {process.returncode}: {root_cause(log.read_text(errors='replace'))}"
        return None

    def _end_tool(self) -> None:
        process, self._tool_process = self._tool_process, None
        if process is not None:
            end_group(process, lambda: os.killpg(process.pid, signal.SIGINT), process.terminate)

    def _stop(self) -> None:
        self._end_tool()
        server, self.server = self.server, None
        if server is not None:
            self.progress.say("ending the server that was started")
            server.stop()

    def _problem(self, line: str) -> None:
        if line not in self.report.problems:
            self.report.problems.append(line)
            self.progress.say(line)
            self.files.write(self.report)
