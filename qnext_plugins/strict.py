"""``QNEXT_STRICT`` without the settings: it must hold where another variable or a library is at fault."""

from __future__ import annotations

import os


def strict() -> bool:
    """Whether an error shall be raised where the plugin would step back with one line."""
    return os.environ.get("QNEXT_STRICT", "").lower() not in ("", "0", "false", "f", "no", "n", "off")
