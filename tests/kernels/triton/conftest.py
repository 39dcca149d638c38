from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pkgutil import walk_packages
from types import ModuleType

import pytest
import torch

import qnext_kernels
from qnext_kernels import force_backend
from tests.kernels.triton.interpreter import interpreted


def kernel_modules() -> list[ModuleType]:
    """The modules of the library that hold kernels and what kernels call."""
    names = [module.name for module in walk_packages(qnext_kernels.__path__, "qnext_kernels.")]
    return [import_module(name) for name in names if name.rpartition(".")[2].startswith("triton_")]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """Triton serves CPU tensors; fresh memory is NaN, so that what is read before it is written shows."""
    with interpreted(*kernel_modules()), force_backend("triton"):
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)
