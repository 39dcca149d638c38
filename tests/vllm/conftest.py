"""Fixtures of the tests on a real vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import qnext_vllm
from tests.logged import logged
from tests.vllm.engines import Engine, engine


@pytest.fixture(scope="class")
def running(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Engine]:
    """An engine on the class's checkpoint; the indirect parameter is options of ``engines.engine``."""
    with engine(checkpoint, **getattr(request, "param", {})) as running:
        yield running


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the plugin logs in this process; vLLM's handler may write where no capture of a test reads."""
    with logged(qnext_vllm.logger) as messages:
        yield messages
