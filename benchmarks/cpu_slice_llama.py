"""llama.cpp in a process of its own that is told, step by step, what to run: a peer in ``cpu_slice.py``.

The process runs in another environment, which has llama-cpp-python, gguf and NumPy; it runs this file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from cpu_slice_engine import Engine, Side

import qnext_plugins
from qnext_plugins.cli.bench.models import Slice
from qnext_plugins.cli.bench.stepped import serve


@dataclass(frozen=True)
class LlamaSide(Side):
    """How llama.cpp is started: by the Python of its environment."""

    python: str = ""
    stored: str = "BF16"
    """The type of linears and experts, of ``cpu_slice_gguf.write``."""


def find_llama(python: str | None, stored: str) -> tuple[LlamaSide, str]:
    """The side, named with llama.cpp's version, and the package that it is of; raises ValueError."""
    expected = "expected the Python of an environment with llama-cpp-python and gguf"
    if not python:
        raise ValueError(f"{expected}, got none")
    script = "import gguf, llama_cpp; print(llama_cpp.llama_version().decode(), llama_cpp.__version__)"
    try:
        done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    except OSError as error:
        raise ValueError(f"{expected}, got {python}: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{expected}, got {python}: {error.stderr.strip().splitlines()[-1]}") from None
    version, package = done.stdout.split()[-2:]
    name = f"llama.cpp {version}, {stored}"
    return LlamaSide(name, plugin=False, python=python, stored=stored), f"llama-cpp-python {package}"


class LlamaEngine(Engine):
    """The handle of llama.cpp; a step is of one token."""

    @classmethod
    def start(cls, side: LlamaSide, model: Slice, threads: int, log: Path) -> Self:
        def start(connection: Connection) -> _Process:
            end = connection.fileno()
            environment = os.environ | {"PYTHONPATH": str(Path(qnext_plugins.__file__).parents[1])}
            with log.open("wb") as output:
                streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
                return _Process([side.python, __file__, str(end)], pass_fds=[end], env=environment, **streams)

        engine = cls(side.name, log, start)
        engine.side = side
        engine._connection.send((asdict(side), model.config(), threads))
        return engine


class _Process(subprocess.Popen):
    """A process with the methods of multiprocessing's."""

    def is_alive(self) -> bool:
        return self.poll() is None

    def join(self, timeout: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout)


class RunningLlama:
    """llama.cpp itself, in the process that runs its steps, with the weights of a GGUF file."""

    def __init__(self, path: Path, side: Side, threads: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        # In memory of its own: pages of a mapped file may be dropped and read from disk again during a step.
        parameters.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise RuntimeError("llama.cpp does not load the GGUF file")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = side.max_tokens
        # A prefill's tokens at once, as in vLLM: more than llama.cpp's 512, and a little faster.
        settings.n_batch = settings.n_ubatch = side.chunk
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        self.chunk = side.chunk
        self.sampler = llama_cpp.llama_sampler_init_greedy()
        self.token = 0

    def prefill(self, prompt: list[int], threads: int) -> float:
        self._use(threads)
        start = time.perf_counter()
        for place in range(0, len(prompt), self.chunk):
            self._decode(prompt[place : place + self.chunk])
        self._sample()
        return time.perf_counter() - start

    def steps(self, count: int, threads: int) -> list[tuple[float, int]]:
        self._use(threads)
        return [(self._step(), 1) for _ in range(count)]

    def finish(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def _step(self) -> float:
        start = time.perf_counter()
        self._decode([self.token])
        self._sample()
        return time.perf_counter() - start

    def _decode(self, tokens: list[int]) -> None:
        values = (ctypes.c_int32 * len(tokens))(*tokens)
        status = self.api.llama_decode(self.context, self.api.llama_batch_get_one(values, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens returned {status}")

    def _sample(self) -> None:
        self.token = self.api.llama_sampler_sample(self.sampler, self.context, -1)

    def _use(self, threads: int) -> None:
        self.api.llama_set_n_threads(self.context, threads, threads)


def _start(side: dict[str, Any], config: dict[str, Any], threads: int) -> RunningLlama:
    from cpu_slice_gguf import random_weights, write

    with tempfile.TemporaryDirectory(prefix="cpu-slice-") as folder:
        path = Path(folder) / "slice.gguf"
        write(path, config, random_weights(), side["stored"])
        return RunningLlama(path, LlamaSide(**side), threads)


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    serve(connection, lambda: _start(*connection.recv()))


if __name__ == "__main__":
    main()
