"""An engine in a process of its own, with processes of its own: it is asked, and nothing of it is left."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from qnext_plugins.cli.bench.stepped import EngineError, EngineProcess


class WithChild:
    """An engine that starts another process."""

    def __init__(self, file: str, tidy: bool) -> None:
        import os

        self.file, self.tidy, self.disabled = Path(file), tidy, os.environ["QNEXT_DISABLE"]
        self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    def about(self) -> tuple[int, str]:
        return self.child.pid, self.disabled

    def fail(self) -> None:
        raise ValueError("no room\nfor so many")

    def shutdown(self) -> None:
        self.file.write_text("shut down")
        if not self.tidy:
            raise RuntimeError("it does not end its child")
        self.child.kill()
        self.child.wait()


def start(tmp_path: Path, tidy: bool) -> EngineProcess:
    settings = {"file": str(tmp_path / "said"), "tidy": tidy}
    name, environment = f"{__name__}:{WithChild.__name__}", {"QNEXT_DISABLE": "1"}
    engine = EngineProcess.spawn("it", tmp_path / "log", name, settings, environment=environment, children=True)
    engine.wait()
    return engine


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("tidy", [True, False])
def test_its_children_end_with_it(tmp_path: Path, tidy: bool) -> None:
    engine = start(tmp_path, tidy)
    child, disabled = engine.ask("about")
    assert disabled == "1"
    assert is_running(child)
    engine.stop()
    deadline = time.monotonic() + 5
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)
    assert (tmp_path / "said").read_text() == "shut down"


def test_what_it_raises_is_one_line_with_its_log(tmp_path: Path) -> None:
    engine = start(tmp_path, tidy=True)
    with pytest.raises(EngineError, match=rf"it: no room; see {tmp_path}/log"):
        engine.ask("fail")
    engine.stop()


def hold(connection: Connection) -> None:
    """End without having read what was sent."""
    connection.poll(10)


def test_one_that_ends_before_it_reads_is_named_with_its_log(tmp_path: Path) -> None:
    def begin(connection: Connection) -> BaseProcess:
        process = multiprocessing.get_context("spawn").Process(target=hold, args=(connection,), daemon=True)
        process.start()
        return process

    engine = EngineProcess("it", tmp_path / "log", begin)
    with pytest.raises(EngineError, match=rf"it: the engine ended; see {tmp_path}/log"):
        engine.ask("about")
    engine.stop()
