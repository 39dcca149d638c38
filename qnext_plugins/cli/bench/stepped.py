"""An engine in a process of its own that is told, step by step, what to run; so that two can take turns."""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_SECONDS = 900
ANSWER_SECONDS = 1800


class EngineError(RuntimeError):
    """An engine could not be started, or ended."""


class EngineProcess:
    """The handle of a process that makes an engine and calls its methods as it is asked."""

    def __init__(self, name: str, log: Path, target: Callable[..., None], *arguments: Any) -> None:
        """Start ``target(connection, *arguments, log)`` in a fresh process; its output goes to ``log``."""
        self.name, self.log = name, log
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments, str(log)), daemon=True)
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it has started; raises EngineError."""
        self._receive(START_SECONDS)

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of the engine gives; raises EngineError."""
        self._connection.send((method, *arguments))
        return self._receive(ANSWER_SECONDS)

    def stop(self) -> None:
        """End it: it goes by itself when nobody asks any more, unless it is in the middle of something."""
        self._connection.close()
        self._process.join(5)
        self._process.kill()
        self._process.join()

    def _receive(self, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while not self._connection.poll(1):
            if not self._process.is_alive() or time.monotonic() > deadline:
                raise EngineError(f"{self.name}: the engine ended or hangs; see {self.log}")
        try:
            kind, value = self._connection.recv()
        except EOFError:
            raise EngineError(f"{self.name}: the engine ended; see {self.log}") from None
        if kind == "error":
            raise EngineError(f"{self.name}: {value}; see {self.log}")
        return value


def serve_steps(connection: Connection, engine: str, settings: dict[str, Any], log: str) -> None:
    """In the engine's process: make ``module:class`` with ``settings``, call its methods until the parent is gone."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    try:
        made = pkgutil.resolve_name(engine)(**settings)
        connection.send(("started", None))
        while True:
            name, *arguments = connection.recv()
            connection.send(("done", getattr(made, name)(*arguments)))
    except EOFError:
        return
    except Exception as error:
        connection.send(("error", str(error).splitlines()[0] if str(error) else repr(error)))
        raise
