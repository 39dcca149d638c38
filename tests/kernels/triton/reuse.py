"""The tests of other backends, run once more for Triton."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def served_by_triton(test: Callable[..., None]) -> Callable[..., None]:
    """The same test with the same parameters, of backend "triton" instead of those that it names."""

    def run(**given: Any) -> None:
        test(backend="triton", **given)

    signature = inspect.signature(test)
    parameters = [parameter for name, parameter in signature.parameters.items() if name != "backend"]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.pytestmark = [mark for mark in test.pytestmark if mark.args[0] != "backend"]  # type: ignore[attr-defined]
    return run
