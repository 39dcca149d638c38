"""Launches that begin before the one in front has ended (programmatic dependent launch of NVIDIA's, from sm_90 on).

A kernel that is launched with :func:`overlapping` loads what was there before the launch in front, waits for that
one's end, and only then reads what it wrote. The one in front lets it begin. Each waits before it lets another
begin, so that of two launches in front the further one has ended.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from qnext_kernels.dispatch import switched_on
from qnext_kernels.triton_support import Target, current_target

APART: Mapping[str, bool] = {"OVERLAPS": False}
"""Options of a launch that begins when the one in front has ended."""

_allowed = switched_on("QNEXT_OVERLAP", default=True)


@triton.jit
def wait_for_launch_in_front(OVERLAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the launch in front has written can be read from here on.

    The next launch may begin, once every program of this one has come here or has ended.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def overlapping(target: Target, wanted: bool = True) -> Mapping[str, bool]:
    """Options of a launch that may begin before the one in front has ended, where the GPU and the user let it."""
    return {"OVERLAPS": True, "launch_pdl": True} if wanted and target.overlaps and _allowed else APART


def overlapping_here() -> Mapping[str, bool]:
    """:func:`overlapping` on the current GPU, for kernels that wait before they load or store anything."""
    return overlapping(current_target())
