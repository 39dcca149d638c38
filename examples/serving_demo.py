"""What the demos share: serve the tiny checkpoint with an engine and this plugin, talk to it, print the figures."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, ClassVar, Self

from openai import DefaultHttpxClient, OpenAI, OpenAIError
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qnext_plugins.server_process import end_group, free_port

ROOT = Path(__file__).resolve().parent.parent
MODEL = "qnext-tiny"
CONTEXT = 2048
# The checkpoint knows this text largely by heart, target and draft alike; anything lower means a broken rollback.
MIN_ACCEPTED_LENGTH = 2.0
QUESTION = "What is `lambda`?"
PROMPT = "The with statement is used to wrap the execution of a block"
# Long enough for several blocks of the prefix cache, short enough for CONTEXT.
PASSAGE = topics["compound"][:3000]
# The first the checkpoint knows by heart; the second it has never seen, so that drafts are rejected and rolled back.
ENDINGS = ('The "with" statement is used', "A list is a lot like a tuple, but")
SAMPLING = {
    "model": MODEL,
    "temperature": 0,
    "max_tokens": 128,
    "stream": True,
    "stream_options": {"include_usage": True},
}
START_LIMIT_S = 600
SERVED = re.compile(r"qnext-plugins (?P<version>\S+) serves (?P<architecture>\w+) in (?P<dtype>\S+): (?P<kernels>.+)")
DECLINED = re.compile(r"qnext-plugins leaves \w+'s own Qwen3-Next in place: (?P<reason>.+)")

console = Console(highlight=False)
# No proxy of the environment comes between us and our own server.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class DemoError(Exception):
    """One sentence about what is not as it should be."""


@dataclass(frozen=True)
class Reply:
    text: str
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Metrics:
    """Counters of /metrics; the speculative ones are 0 without speculation."""

    drafts: int
    """How often drafts were verified."""
    drafted: int
    accepted: int
    cached: int

    @property
    def accepted_length(self) -> float:
        return 1 + self.accepted / self.drafts


@dataclass(frozen=True)
class Run:
    """What one server did."""

    start_up: float
    served: list[re.Match[str]]
    chat: Reply
    completion: Reply
    metrics: Metrics


class EngineServer(ABC):
    """An engine's server in a process group of its own, gone when the `with` block is left."""

    engine: ClassVar[str]
    prefix_cache: ClassVar[str]
    """What the engine calls it."""
    draft_tokens: ClassVar[int]
    settings: ClassVar[tuple[str, ...]]
    speculation: ClassVar[tuple[str, ...]]
    draft_architecture: ClassVar[str]
    log_name: ClassVar[str]
    log_message: ClassVar[re.Pattern[str]]

    def __init__(self, checkpoint: Path, log: Path, *, speculative: bool, flags: tuple[str, ...] = ()) -> None:
        self.log = log
        self.speculative = speculative
        port = free_port()
        self.command = [*self.launcher(checkpoint), "--served-model-name", MODEL]
        self.command += ["--host", "127.0.0.1", "--port", str(port)]
        self.command += (*self.settings, *(self.speculation if speculative else ()), *flags)
        self.url = f"http://127.0.0.1:{port}"

    @abstractmethod
    def launcher(self, checkpoint: Path) -> list[str]:
        """The command without its flags; raises DemoError if the engine is not there."""

    @abstractmethod
    def read_metrics(self, counter: Callable[..., int]) -> Metrics:
        """Metrics from ``counter(name, **labels)``, which raises DemoError without such a counter."""

    def __enter__(self) -> Self:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)
        return self

    def __exit__(self, *exc_info: object) -> None:
        end_group(self.process, self.interrupt, self.terminate)

    def interrupt(self) -> None:
        """Ask for the end, the way that leaves nothing behind."""
        os.killpg(self.process.pid, signal.SIGINT)

    def terminate(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)

    def get(self, path: str) -> str:
        with DIRECT.open(self.url + path, timeout=10) as response:
            return str(response.read().decode())

    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def failure(self, what: str) -> DemoError:
        last = "\n".join(self.lines()[-30:])
        return DemoError(f"{what}; the last lines of {self.log} are:\n{last}")

    def ready(self) -> bool:
        """Whether /health answers; raises DemoError if the server has ended."""
        if (status := self.process.poll()) is not None:
            raise self.failure(f"the server ended with status {status} while starting")
        try:
            self.get("/health")
        except OSError:
            return False
        return True

    def wait(self) -> float:
        """Show the start-up until the server is ready; returns its seconds."""
        start = reported = time.monotonic()
        with console.status("") as status:
            while not self.ready():
                elapsed = time.monotonic() - start
                if elapsed > START_LIMIT_S:
                    raise self.failure(f"the server is not ready after {START_LIMIT_S} s")
                messages = [found["message"] for line in self.lines() if (found := self.log_message.search(line))]
                progress = f"starting, {elapsed:.0f} s: {messages[-1] if messages else '...'}"[: console.width - 4]
                status.update(escape(progress))
                if not console.is_terminal and time.monotonic() - reported > 15:
                    reported = time.monotonic()
                    console.print(progress, markup=False)
                time.sleep(0.5)
        return time.monotonic() - start

    def served(self) -> list[re.Match[str]]:
        """The plugin's lines in the log, one an architecture; raises DemoError if one is missing."""
        log = "\n".join(self.lines())
        found = {match["architecture"]: match for match in SERVED.finditer(log)}
        for architecture in ("Qwen3NextForCausalLM", *((self.draft_architecture,) if self.speculative else ())):
            if architecture not in found:
                declined = DECLINED.search(log)
                reason = declined["reason"] if declined else f"{self.log} does not say why (is QNEXT_DISABLE set?)"
                raise DemoError(f"{self.engine} served its own {architecture} instead of the plugin's: {reason}")
        return list(found.values())

    def metrics(self) -> Metrics:
        """Read /metrics; raises DemoError if a counter is missing."""
        families = text_string_to_metric_families(self.get("/metrics"))
        samples = [sample for family in families for sample in family.samples]

        def counter(name: str, **labels: str) -> int:
            values = [
                sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()
            ]
            if not values:
                raise DemoError(f"/metrics of the server has no {name}.")
            return int(sum(values))

        return self.read_metrics(counter)


def show(title: str, create: Callable[..., Iterable[Any]], **prompt: Any) -> Reply:
    """Ask, and print the answer as it arrives."""
    console.print(f"\n{title}", style="bold", markup=False)
    start, text, tokens = time.monotonic(), "", 0
    for chunk in create(**prompt, **SAMPLING):
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            piece = (choice.delta.content if hasattr(choice, "delta") else choice.text) or ""
            print(piece, end="", flush=True)
            text += piece
    print()
    if not text.strip():
        raise DemoError(f"the server answered no text ({title}).")
    return Reply(text, tokens, time.monotonic() - start)


def talk(url: str) -> tuple[Reply, Reply]:
    """A chat, a completion, and two completions that share a long prefix; returns the first two."""
    http = DefaultHttpxClient(trust_env=False)
    client = OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=0, timeout=120)
    messages = [{"role": "user", "content": QUESTION}]
    chat = show(f"Chat: {QUESTION}", client.chat.completions.create, messages=messages)
    completion = show(f"Completion: {PROMPT} ...", client.completions.create, prompt=PROMPT)
    for ending in ENDINGS:
        title = f"Completion of {len(PASSAGE)} characters of the reference and: {ending} ..."
        show(title, client.completions.create, prompt=f"{PASSAGE}\n\n{ending}")
    return chat, completion


def use(server: EngineServer) -> Run:
    """Start ``server``, talk to it, end it."""
    with server:
        console.print(f"\n[bold]$[/bold] {shlex.join(server.command)}", soft_wrap=True)
        start_up = server.wait()
        served = server.served()
        try:
            chat, completion = talk(server.url)
            return Run(start_up, served, chat, completion, server.metrics())
        except (OpenAIError, OSError) as error:
            raise server.failure(f"a request failed ({type(error).__name__}: {error})") from error


def report(server_type: type[EngineServer], run: Run, plain: Run | None) -> Table:
    table = Table(title=f"{MODEL} on {server_type.engine}", show_header=False)
    table.add_row("start-up", f"{run.start_up:.0f} s")
    table.add_row("chat", f"{run.chat.rate:.0f} tokens/s")
    table.add_row("completion", f"{run.completion.rate:.0f} tokens/s")
    metrics = run.metrics
    drafts = f"{metrics.accepted} of {metrics.drafted} drafted tokens accepted"
    table.add_row("mean accepted length", f"{metrics.accepted_length:.2f} of {1 + server_type.draft_tokens} ({drafts})")
    table.add_row(f"from the {server_type.prefix_cache}", f"{metrics.cached} tokens")
    for served in run.served:
        table.add_row(served["architecture"], f"{served['dtype']}: {served['kernels']}")
    if plain is not None:
        for name, ours, theirs in (("chat", run.chat, plain.chat), ("completion", run.completion, plain.completion)):
            text = "identical" if ours.text == theirs.text else "different"
            ratio = f"with it {ours.rate / theirs.rate:.2f} times as fast, greedy text {text}"
            table.add_row(f"{name} without speculation", f"{theirs.rate:.0f} tokens/s; {ratio}")
    return table


def check(server_type: type[EngineServer], metrics: Metrics) -> None:
    """Raise DemoError unless speculation and prefix cache did their work."""
    if metrics.accepted == 0:
        raise DemoError(f"speculation accepted none of {metrics.drafted} drafted tokens.")
    if metrics.accepted == metrics.drafted:
        raise DemoError(f"speculation accepted all of {metrics.drafted} drafted tokens, so nothing verified them.")
    if metrics.accepted_length < MIN_ACCEPTED_LENGTH:
        raise DemoError(f"mean accepted length {metrics.accepted_length:.2f} is below {MIN_ACCEPTED_LENGTH}.")
    if metrics.cached == 0:
        raise DemoError(f"the {server_type.prefix_cache} was never hit.")


def main(server_type: type[EngineServer], description: str | None) -> int:
    """Run the demo with the arguments of the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples" / "tiny" / "checkpoint")
    parser.add_argument("--compare", action="store_true", help="also serve without speculation")
    parser.add_argument("--log", type=Path, default=ROOT / "build" / server_type.log_name, help="the server's log")
    args = parser.parse_args()
    checkpoint = args.checkpoint.resolve()
    # So that `kill` runs the `with` block's end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run = use(server_type(checkpoint, args.log, speculative=True))
        plain = None
        if args.compare:
            plain = use(server_type(checkpoint, args.log.with_suffix(".plain.log"), speculative=False))
        if run.metrics.drafts:
            console.print("", report(server_type, run, plain))
        check(server_type, run.metrics)
    except DemoError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    return 0
