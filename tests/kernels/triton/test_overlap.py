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


@pytest.mark.parametrize(
    ("value", "options"),
    [
        ("", {"OVERLAPS": True, "launch_pdl": True}),
        ("1", {"OVERLAPS": True, "launch_pdl": True}),
        ("0", {"OVERLAPS": False}),
    ],
)
def test_launches_overlap_unless_the_user_turns_it_off(value: str, options: dict[str, bool]) -> None:
    process = subprocess.run(
        [sys.executable, "-c", HOPPER],
        env=os.environ | {"QNEXT_OVERLAP": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.strip() == str(options)
