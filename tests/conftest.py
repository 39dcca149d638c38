"""Fixtures of all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints import TINY, write_random_checkpoint

pytest.register_assert_rewrite("tests.completions")

# transformers runs here beside an engine on the same few cores; threads that wait for each other would take minutes.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint whose drafts are partly accepted."""
    return write_random_checkpoint(tmp_path_factory.mktemp("random") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """The trained checkpoint."""
    return TINY


@pytest.fixture(scope="class")
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """The checkpoint named by a class's indirect parameter: "tiny" or "random"."""
    return request.getfixturevalue(f"{request.param}_checkpoint")
