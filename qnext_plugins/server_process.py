"""Servers that we start: a free port for them, and their end with all that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def end_group(process: subprocess.Popen, interrupt: Callable[[], None], terminate: Callable[[], None]) -> None:
    """End a process and its whole group, first as it likes it, in the end for certain.

    Args:
        process: the leader of a process group of its own (``start_new_session=True``).
        interrupt: asks for the end in the way that leaves nothing behind; it has 20 s.
        terminate: asks once more; it has 10 s.
    """
    try:
        for end, patience in ((interrupt, 20.0), (terminate, 10.0)):
            if process.poll() is None:
                end()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
        # Its helpers end by themselves and remove their shared memory; they get a moment for that.
        for _ in range(50):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    except ProcessLookupError:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
