"""An engine whose scheduler runs the model on the kernels for GPUs, interpreted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers.scheduler import run_scheduler_process
from triton.runtime.interpreter import GridExecutor

from qnext_kernels import force_backend
from tests.kernels.triton.interpreter import interpreted, kernel_modules, operations_on_triton

LAUNCHED = "TEST_LAUNCHED_KERNELS"
"""Names a file, to which the scheduler writes the names of the kernels that it runs."""


def record_launches(file: Path) -> None:
    """Write the name of every kernel that the interpreter runs from now on to ``file``, once."""
    names: set[str] = set()
    run = GridExecutor.__call__

    def call(self: Any, *args: Any, **options: Any) -> None:
        if self.fn.__name__ not in names:
            names.add(self.fn.__name__)
            file.write_text("\n".join(sorted(names)))
        run(self, *args, **options)

    GridExecutor.__call__ = call


def run_interpreted_scheduler(*args: Any, **options: Any) -> Any:
    """SGLang's scheduler, in a process of its own, inside the interpreter."""
    triton = ",".join(f"{name}=triton" for name in operations_on_triton())
    with interpreted(*kernel_modules()), force_backend(triton):
        record_launches(Path(os.environ[LAUNCHED]))
        return run_scheduler_process(*args, **options)


class InterpretedEngine(Engine):
    run_scheduler_process_func = staticmethod(run_interpreted_scheduler)
