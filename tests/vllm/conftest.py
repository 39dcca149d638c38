"""Fixtures of the tests on a real vLLM."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import qnext_vllm
from tests.vllm.engines import Engine, engine


@pytest.fixture(scope="class")
def running(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Engine]:
    """An engine on the class's checkpoint; the indirect parameter is options of ``engines.engine``."""
    with engine(checkpoint, **getattr(request, "param", {})) as running:
        yield running


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the plugin logs in this process; vLLM's handler may write where no capture of a test reads."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    qnext_vllm.logger.addHandler(handler)
    yield messages
    qnext_vllm.logger.removeHandler(handler)
