"""The engines' own benchmarks of servers: their command lines, and what their result files say.

``vllm bench serve`` and SGLang's ``bench_serving`` send the load, stream, count and average; nothing of that is done
here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnext_plugins.cli.compare.report import Entry

PROGRESS = re.compile(r"(\d+)/(\d+) \[")
"""How far a tool is, in the bar that it draws."""


class ToolError(RuntimeError):
    """A tool's result file does not say what it should; one line."""


class Times(Entry):
    """Milliseconds over the requests, or over the gaps between pieces."""

    mean: float
    p50: float
    p99: float


class Level(Entry):
    """A load of so many requests at a time, as a tool reports it."""

    concurrency: int
    requests: int
    completed: int
    seconds: float
    input_tokens: int
    output_tokens: int
    output_tokens_per_second: float
    first_token: Times
    inter_token: Times
    """Between two pieces of a stream: several tokens each where drafts are accepted."""
    time_per_token: Times
    """Of a request, from its first token on."""
    accepted_length: float | None = None
    """Tokens a step with drafts, where the engine says it."""

    @property
    def failed(self) -> int:
        return self.requests - self.completed


@dataclass(frozen=True)
class Load:
    """What is asked of a tool."""

    url: str
    server: str
    """``vllm``, ``sglang`` or ``openai``."""
    model: str
    """As the server names it."""
    tokenizer: str
    input_tokens: int
    output_tokens: int
    requests: int
    concurrency: int


def command(tool: str, python: str, load: Load, result: Path) -> list[str]:
    """The command line that puts ``load`` on a server and writes to ``result``."""
    # Another seed for each level: no cached prefix of the one before shortens a prefill.
    size = ["--random-input-len", str(load.input_tokens), "--random-output-len", str(load.output_tokens)]
    amount = ["--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)]
    names = ["--model", load.tokenizer, "--served-model-name", load.model, "--tokenizer", load.tokenizer]
    common = ["--base-url", load.url, *names, *size, *amount, "--seed", str(load.concurrency)]
    if tool == "vllm":
        start = ["-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai", "--dataset-name", "random"]
        save = ["--save-result", "--save-detailed", "--result-dir", str(result.parent), "--result-filename"]
        own = ["--ignore-eos", "--num-warmups", "1", *save, result.name]
    else:
        backend = "sglang" if load.server == "sglang" else "vllm"
        # Its dataset called random downloads texts to cut its prompts from.
        start = ["-m", "sglang.bench_serving", "--backend", backend, "--dataset-name", "random-ids"]
        own = ["--random-range-ratio", "1", "--output-details", "--ready-check-timeout-sec", "5"]
        own += ["--output-file", str(result)]
    return [python, "-P", *start, *common, *own]


def read_result(tool: str, text: str, load: Load) -> tuple[Level, str | None]:
    """A tool's result file: the level, and the first error of a request; raises ToolError."""
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise TypeError(f"expected an object, got {type(found).__name__}")
        accepted = found.get("spec_decode_acceptance_length" if tool == "vllm" else "accept_length")
        level = Level(
            concurrency=load.concurrency,
            requests=load.requests,
            completed=found["completed"],
            seconds=found["duration"],
            input_tokens=found["total_input_tokens"],
            output_tokens=found["total_output_tokens"],
            output_tokens_per_second=found["output_throughput"],
            first_token=_times(found, "ttft"),
            inter_token=_times(found, "itl"),
            time_per_token=_times(found, "tpot"),
            accepted_length=accepted,
        )
    except (ValueError, TypeError, KeyError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise ToolError(f"the result file is not what this version reads ({what})") from error
    errors = [each for each in found.get("errors") or [] if each]
    return level, _last_line(str(errors[0])) if errors else None


def progress(log: str, requests: int) -> int:
    """How many of so many requests the bar in a tool's log counts; other bars are those of its warm-up."""
    return max((int(done) for done, total in PROGRESS.findall(log) if int(total) == requests), default=0)


def _times(found: dict[str, Any], name: str) -> Times:
    return Times(mean=found[f"mean_{name}_ms"], p50=found[f"median_{name}_ms"], p99=found[f"p99_{name}_ms"])


def _last_line(error: str) -> str:
    """What an error comes down to: a traceback says it in its last line."""
    return ([line.strip() for line in error.splitlines() if line.strip()] or ["an error without a text"])[-1][:200]
