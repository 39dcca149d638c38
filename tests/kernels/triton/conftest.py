from __future__ import annotations

from collections.abc import Iterator

import pytest

from qnext_kernels import force_backend
from qnext_kernels.gated_delta_rule import triton_state
from tests.kernels.triton.interpreter import PLACES, kernels_run


@pytest.fixture(scope="module", params=PLACES)
def interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    """Triton serves the tensors that a test makes; fresh memory is NaN, so that what is read before written shows."""
    with kernels_run(request.param), force_backend("triton"):
        yield


@pytest.fixture
def walk_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper walks from chunk to chunk as every other GPU does."""
    monkeypatch.setattr(triton_state, "_gluon_allowed", False)
