"""``qnext doctor``: what is here, what would serve, and what would not work, with its mending.

The checks of an engine lie in the engine's package, behind the entry point group ``qnext_plugins.doctor``: each entry
is an :class:`EngineDoctor`. This package imports no engine.
"""

from qnext_plugins.cli.doctor.findings import (
    Check,
    EngineDoctor,
    Finding,
    Status,
    Subject,
    failure,
    note,
    ok,
    warning,
)

__all__ = ["Check", "EngineDoctor", "Finding", "Status", "Subject", "failure", "note", "ok", "warning"]
