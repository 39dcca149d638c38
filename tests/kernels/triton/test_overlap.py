"""A user may have every launch wait for the one in front."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HOPPER = """
from qnext_kernels.triton_overlap import overlapping
from qnext_kernels.triton_support import Target
print(dict(overlapping(Target(nvidia=True, shared_memory=1 << 17, overlaps=True))))
"""


def printed_with(variable: str, value: str, script: str) -> str:
    """What a Python script prints in a process of its own, where an environment variable has a value."""
    process = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {variable: value},
        capture_output=True,
        text=True,
        check=True,
    )
    return process.stdout.strip()


@pytest.mark.parametrize(
    ("value", "options"),
    [
        ("", {"OVERLAPS": True, "launch_pdl": True}),
        ("1", {"OVERLAPS": True, "launch_pdl": True}),
        ("0", {"OVERLAPS": False}),
    ],
)
def test_launches_overlap_unless_the_user_turns_it_off(value: str, options: dict[str, bool]) -> None:
    assert printed_with("QNEXT_OVERLAP", value, HOPPER) == str(options)
