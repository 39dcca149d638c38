from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qnext_kernels import force_backend
from qnext_kernels.gated_delta_rule import triton_chunked, triton_math, triton_recurrent
from tests.kernels.triton.interpreter import interpreted


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """Triton serves CPU tensors; fresh memory is NaN, so that what is read before it is written shows."""
    with interpreted(triton_math, triton_recurrent, triton_chunked), force_backend("triton"):
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)
