"""The scripts in benchmarks/, which are in no package."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        return importlib.import_module(name)


@pytest.fixture(scope="session")
def thin_wheels() -> ModuleType:
    return script("thin_wheels")


@pytest.fixture(scope="session")
def pack_bare() -> ModuleType:
    return script("pack_bare")
