"""Fixtures of the tests on a real SGLang."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sglang.engines import Engine, engine


@pytest.fixture(scope="class")
def running(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Engine]:
    """An engine on the class's checkpoint; the indirect parameter is options of ``engines.engine``."""
    with engine(checkpoint, **getattr(request, "param", {})) as running:
        yield running
