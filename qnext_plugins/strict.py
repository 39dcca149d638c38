"""``QNEXT_STRICT`` without the settings: it must hold where another variable or a library is at fault."""

from __future__ import annotations

import os


def strict() -> bool:
    """Whether an error shall be raised where the plugin would step back with one line.

    ``QNEXT_DETERMINISTIC`` asks for it too: the engine's own model does not keep that promise.
    """
    return any(_is_on(variable) for variable in ("QNEXT_STRICT", "QNEXT_DETERMINISTIC"))


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "f", "no", "n", "off")
