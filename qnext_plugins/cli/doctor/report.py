"""The report of ``qnext doctor``: its keys are stable, so that programs can read ``--json``."""

from __future__ import annotations

from pydantic import BaseModel, computed_field

from qnext_plugins.cli.doctor.findings import CheckResult, Status


class Machine(BaseModel):
    """Where the doctor runs."""

    python: str
    executable: str
    system: str
    glibc: str | None
    torch: str
    device: str
    """``cpu``, ``cuda``, …: what torch would compute on."""
    device_name: str
    memory_bytes: int
    memory_available_bytes: int
    instruction_sets: list[str]
    """Those of the processor that kernels ask for."""


class Threads(BaseModel):
    """Who may compute where."""

    cores: list[int]
    """That this process may run on."""
    cpu_quota: float | None
    """Cores' worth of time that a container may use; None: no limit."""
    torch_threads: int
    variables: dict[str, str]
    """Variables that are set and bind threads or say how many there are."""


class Library(BaseModel):
    """The C++ kernels."""

    compiler: str | None
    cache_folder: str
    path: str | None
    """Of the library; None where it cannot be had."""
    compiled_now: bool
    reason: str | None
    """Why it cannot be had."""


class Serving(BaseModel):
    """Which backend would serve an operation, and why each other one does not."""

    operation: str
    dtype: str
    backend: str | None
    """None: no backend serves, or a forced one cannot."""
    others: dict[str, str]
    """The other backends: why they decline, or that they would serve too."""


class Engine(BaseModel):
    """vLLM or SGLang in this environment."""

    name: str
    version: str | None
    """None: not installed."""
    supported: str
    """Versions that the plugin accepts."""
    tested: bool
    """Whether the tests run with this version."""


class Report(BaseModel):
    """All that ``qnext doctor`` found; a section that could not be made is None, and a check says why."""

    qnext_plugins: str
    machine: Machine | None
    threads: Threads | None
    library: Library | None
    backends: list[Serving]
    engines: list[Engine]
    variables: dict[str, str]
    """The ``QNEXT_*`` variables that are set."""
    model: str | None
    checks: list[CheckResult]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(check.status != Status.FAILURE for check in self.checks)
