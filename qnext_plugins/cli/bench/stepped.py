"""An engine in a process of its own that is told, step by step, what to run; so that two can take turns."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pkgutil
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, Self

START_SECONDS = 900
ANSWER_SECONDS = 1800
STOP_SECONDS = 20


class EngineError(RuntimeError):
    """An engine could not be started, or ended."""


class Process(Protocol):
    """What is asked of a process; multiprocessing's is one."""

    def is_alive(self) -> bool: ...

    def join(self, timeout: float | None = None) -> None: ...

    def kill(self) -> None: ...


class Group:
    """A process that leads a group of its own, and the whole group where it is killed."""

    def __init__(self, leader: BaseProcess) -> None:
        self._leader = leader

    def is_alive(self) -> bool:
        return self._leader.is_alive()

    def join(self, timeout: float | None = None) -> None:
        self._leader.join(timeout)

    def kill(self) -> None:
        assert self._leader.pid is not None
        # There is no such group any more, or the leader has not made it yet.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._leader.pid, signal.SIGKILL)
        self._leader.kill()


class EngineProcess:
    """The handle of a process that makes an engine and calls its methods as it is asked."""

    def __init__(self, name: str, log: Path, start: Callable[[Connection], Process]) -> None:
        """``start`` starts the process, which answers at the other end of the connection it is given (:func:`serve`).

        What the process prints is to be found in ``log``.
        """
        self.name, self.log = name, log
        self._connection, theirs = multiprocessing.Pipe()
        self._process = start(theirs)
        theirs.close()

    @classmethod
    def spawn(
        cls,
        name: str,
        log: Path,
        engine: str,
        settings: dict[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        children: bool = False,
    ) -> Self:
        """Make ``engine`` (``module:class``) with ``settings`` in a fresh Python.

        Args:
            environment: variables that are set before the engine's module is imported.
            children: whether the engine starts processes of its own; they end with it.
        """

        def start(connection: Connection) -> Process:
            context = multiprocessing.get_context("spawn")
            arguments = (connection, engine, settings, str(log), dict(environment or {}), children)
            process = context.Process(target=_serve_here, args=arguments, daemon=not children)
            process.start()
            return Group(process) if children else process

        return cls(name, log, start)

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
        self._process.join(STOP_SECONDS)
        self._process.kill()
        self._process.join()

    def _receive(self, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while not self._connection.poll(1):
            if not self._process.is_alive() or time.monotonic() > deadline:
                raise EngineError(f"{self.name}: the engine ended or hangs; see {self.log}")
        try:
            kind, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise EngineError(f"{self.name}: the engine ended; see {self.log}") from None
        if kind == "error":
            raise EngineError(f"{self.name}: {value}; see {self.log}")
        return value


def serve(connection: Connection, make: Callable[[], Any]) -> None:
    """In the engine's process: make it and call its methods as :class:`EngineProcess` asks, until that is gone.

    Then its ``shutdown`` is called, if it has one.
    """
    engine = None
    try:
        engine = make()
        connection.send(("started", None))
        while True:
            name, *arguments = connection.recv()
            connection.send(("done", getattr(engine, name)(*arguments)))
    except EOFError:
        getattr(engine, "shutdown", lambda: None)()
    except Exception as error:
        connection.send(("error", str(error).splitlines()[0] if str(error) else repr(error)))
        raise


def _serve_here(
    connection: Connection, engine: str, settings: dict[str, Any], log: str, environment: dict[str, str], children: bool
) -> None:
    if children:
        os.setpgid(0, 0)
    os.environ |= environment
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    serve(connection, lambda: pkgutil.resolve_name(engine)(**settings))
