"""What both engines' OpenAI-compatible servers are asked in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openai import OpenAI

from examples.serving_demo import MODEL, EngineServer

PROMPT = "The with statement is used to wrap the execution of a block"
CHAT = [{"role": "user", "content": "What is a coroutine?"}]


@dataclass
class Running:
    client: OpenAI
    server: EngineServer


def connect(server: EngineServer) -> Running:
    """Wait until a server has started."""
    server.wait()
    return Running(OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0), server)


def complete(running: Running, **options: Any):
    """A greedy completion of ``PROMPT``, where ``options`` do not say otherwise."""
    return running.client.completions.create(
        **{"model": MODEL, "prompt": PROMPT, "max_tokens": 32, "temperature": 0.0, "seed": 7} | options
    )


class Completions:
    """Tests of a server that speculates; a module with a fixture ``running`` inherits them."""

    def test_streaming_gives_the_text_of_a_whole_answer(self, running: Running) -> None:
        whole = complete(running).choices[0].text
        parts = [chunk.choices[0].text for chunk in complete(running, stream=True) if chunk.choices]
        assert whole.strip()
        assert len(parts) > 1
        assert "".join(parts) == whole

    def test_stop_string_ends_the_text_before_it(self, running: Running) -> None:
        whole = complete(running, max_tokens=48).choices[0].text
        stop = whole.split()[3]
        choice = complete(running, max_tokens=48, stop=[stop]).choices[0]
        assert choice.finish_reason == "stop"
        assert choice.text == whole[: whole.index(stop)]

    def test_log_probs_belong_to_the_tokens(self, running: Running) -> None:
        choice = complete(running, logprobs=3, max_tokens=12).choices[0]
        assert choice.logprobs is not None
        assert "".join(choice.logprobs.tokens) == choice.text
        for token, given, top in zip(
            choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
        ):
            assert given == top[token] == max(top.values()), "greedy takes the most likely token"
            assert given <= 0.0

    def test_metrics_count_accepted_and_rejected_drafts(self, running: Running) -> None:
        complete(running, prompt="Once upon a time", max_tokens=64)
        metrics = running.server.metrics()
        assert 0 < metrics.accepted < metrics.drafted
