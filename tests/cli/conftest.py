from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def gpu_ops() -> ModuleType:
    """benchmarks/gpu_ops.py."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("gpu_ops")
    finally:
        sys.path.remove(folder)
