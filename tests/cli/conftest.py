from __future__ import annotations

from types import ModuleType

import pytest

from tests.benchmarks.conftest import script


@pytest.fixture(scope="module")
def gpu_ops() -> ModuleType:
    """benchmarks/gpu_ops.py."""
    return script("gpu_ops")
