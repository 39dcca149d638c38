from __future__ import annotations

from collections.abc import Iterator

import pytest

from qnext_kernels import force_backend
from tests.kernels.triton.interpreter import PLACES, kernels_run


@pytest.fixture(scope="module", params=PLACES)
def interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    """Triton serves the tensors that a test makes; fresh memory is NaN, so that what is read before written shows."""
    with kernels_run(request.param), force_backend("triton"):
        yield
