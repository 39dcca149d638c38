"""Huge pages: asked for where they fit, never a change of what is stored."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qnext_kernels.memory import HUGE_PAGE, SMALLEST, use_huge_pages

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(tensor: Tensor) -> int:
    """How much of the mappings that a tensor lies in is backed by huge pages."""
    begin, end, total, inside = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) < end and begin < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) << 10
    return total


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="this system has no huge pages")
@pytest.mark.parametrize("written_before", [False, True])
def test_a_large_tensor_lies_on_huge_pages(written_before: bool) -> None:
    x = torch.empty(16 * HUGE_PAGE, dtype=torch.uint8)
    if written_before:
        x.fill_(7)
    use_huge_pages(x)
    x[::4096] = 7
    assert huge_bytes(x) >= 14 * HUGE_PAGE


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="this system has no huge pages")
@pytest.mark.parametrize(("size", "huge"), [(HUGE_PAGE, 2), (SMALLEST, 1), (SMALLEST - 1, 0)])
def test_the_pages_in_which_a_tensor_begins_and_ends_are_huge(size: int, huge: int) -> None:
    memory = mmap.mmap(-1, 4 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE_PAGE + HUGE_PAGE // 2
    x = torch.frombuffer(memory, dtype=torch.uint8, offset=begin, count=size)
    use_huge_pages(x)
    whole[::4096] = 7
    assert huge_bytes(x) == huge * HUGE_PAGE


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="this system has no huge pages")
def test_what_lies_beside_a_tensor_and_cannot_be_huge_leaves_the_rest_huge() -> None:
    memory = mmap.mmap(-1, 8 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = whole.data_ptr() + -whole.data_ptr() % HUGE_PAGE
    half, tensor_bytes = HUGE_PAGE // 2, 6 * HUGE_PAGE
    x = whole[begin + half - whole.data_ptr() :][:tensor_bytes]
    x.fill_(7)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for beside in (begin, begin + half + tensor_bytes):
        assert protect(beside, half, mmap.PROT_READ) == 0, ctypes.get_errno()
    use_huge_pages(torch.frombuffer(memory, dtype=torch.uint8, offset=x.storage_offset(), count=tensor_bytes))
    assert huge_bytes(x) == 5 * HUGE_PAGE
    assert (x == 7).all()


def test_contents_stay() -> None:
    x = torch.randn(3 * HUGE_PAGE // 4 + 5)
    before = x.clone()
    use_huge_pages(x, x[7:])
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [0, 1, 1000, HUGE_PAGE])
def test_small_tensors_and_other_devices_are_left_alone(size: int) -> None:
    use_huge_pages(torch.empty(size, dtype=torch.uint8), torch.empty(size, device="meta"))
