"""Launches that begin before the one in front has ended (programmatic dependent launch of NVIDIA's, from sm_90 on).

A kernel that is launched with :func:`overlapping` loads what was there before the launch in front, waits for that
one's end, and only then reads what it wrote. The one in front lets it begin.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qnext_kernels.triton_support import Target


@triton.jit
def wait_for_launch_in_front(OVERLAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the launch in front has written can be read from here on."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_launch_begin(OVERLAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Once every program of this launch has come here or has ended."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()


def overlapping(target: Target, wanted: bool = True) -> dict[str, bool]:
    """Options of a launch that may begin before the one in front has ended, where the GPU can do that."""
    return {"OVERLAPS": True, "launch_pdl": True} if wanted and target.overlaps else {"OVERLAPS": False}
