"""Pages of 2 MiB under large tensors: with 4 KiB a processor's own prefetching ends with every row of a weight."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import time
from functools import cache
from itertools import pairwise

from torch import Tensor

HUGE_PAGE = 2 << 20
AT_ONCE = 64 * HUGE_PAGE
SECONDS_FOR_HUGE_PAGES = 5.0
"""Of an engine's start, at most, for moving its pools."""
SMALLEST = 128 << 10
"""Bytes of a tensor that the C library gives memory of its own, at least."""
MADV_COLLAPSE = 25  # of <linux/mman.h>, since Linux 6.1


def use_huge_pages(*tensors: Tensor, seconds: float = math.inf) -> None:
    """Ask Linux to back the memory of CPU tensors with huge pages: what is not written yet at once, the rest by a copy.

    The huge pages in which a tensor begins and ends are asked for too, with what else lies in them: as a rule other
    tensors of the model. Where the system does not have them, nothing changes.

    Args:
        tensors: any; those of other devices and those of less than 128 KiB are left alone.
        seconds: after which nothing more is copied; Linux may do so later.
    """
    last = time.monotonic() + seconds
    for tensor in tensors:
        if tensor.device.type != "cpu" or (memory := tensor.untyped_storage()).nbytes() < SMALLEST:
            continue
        begin = memory.data_ptr() // HUGE_PAGE * HUGE_PAGE
        end = -(-(memory.data_ptr() + memory.nbytes()) // HUGE_PAGE) * HUGE_PAGE
        if (madvise := _madvise()) is not None:
            madvise(begin, end - begin, mmap.MADV_HUGEPAGE)
            # A call ends at the first page that cannot be huge, as the outer two where not all of them is mapped.
            parts = [begin, *range(begin + HUGE_PAGE, end - HUGE_PAGE, AT_ONCE), max(begin, end - HUGE_PAGE), end]
            for part, after in pairwise(parts):
                if time.monotonic() > last:
                    return
                madvise(part, after - part, MADV_COLLAPSE)


@cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
