"""One server of each engine for all clients."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
from transformers import AutoTokenizer

from examples import demo_sglang, demo_vllm
from examples.serving_demo import EngineServer
from tests.checkpoints import TINY

ENGINES: dict[str, tuple[type[EngineServer], tuple[str, ...]]] = {
    "vllm": (
        demo_vllm.Server,
        (
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            # Between the parts of JSON a grammar allows any number of spaces, and the checkpoint likes them.
            *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
        ),
    ),
    "sglang": (demo_sglang.Server, ("--tool-call-parser", "qwen25")),
}


class Served(NamedTuple):
    """A running server, and what makes the checkpoint's tool calls short."""

    engine: str
    server: EngineServer
    request: dict[str, Any]

    @property
    def url(self) -> str:
        return f"{self.server.url}/v1"

    @property
    def options(self) -> list[str]:
        """The same as an option of the examples."""
        return ["--request", json.dumps(self.request)]


def no_spaces() -> dict[str, float]:
    """A bias against tokens of nothing but spaces."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return {str(token): -100.0 for token in range(len(tokenizer)) if tokenizer.decode([token]).isspace()}


@pytest.fixture(
    scope="package",
    params=[pytest.param("vllm", marks=pytest.mark.vllm), pytest.param("sglang", marks=pytest.mark.sglang)],
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The tiny checkpoint with drafts on the engine of this environment."""
    engine = request.param
    if find_spec(engine) is None:
        pytest.skip(f"this environment has no {engine}")
    server_class, flags = ENGINES[engine]
    log = tmp_path_factory.mktemp(engine) / "log.txt"
    with server_class(TINY, log, speculative=True, flags=flags) as server:
        server.wait()
        yield Served(engine, server, {"logit_bias": no_spaces()} if engine == "sglang" else {})


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a client that goes through no proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return dict(os.environ)
