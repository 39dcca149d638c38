"""``vllm serve`` with its default flags and speculation: the engine's own features, unharmed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from openai import OpenAI

from examples.demo_vllm import Server
from examples.serving_demo import MODEL
from tests.checkpoints import TINY

pytestmark = pytest.mark.vllm

PROMPT = "The with statement is used to wrap the execution of a block"
CHAT = [{"role": "user", "content": "What is a coroutine?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer", "enum": [1, 2]}},
            "required": ["days"],
        },
    },
}


@dataclass
class Running:
    client: OpenAI
    server: Server


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    flags = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
    # The checkpoint does not think: a grammar writes its thoughts, which vLLM by default leaves free.
    flags += ("--structured-outputs-config", '{"enable_in_reasoning": true}')
    with Server(TINY, log, speculative=True, flags=flags) as server:
        server.wait()
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        yield Running(client, server)


def complete(running: Running, **options: object):
    return running.client.completions.create(
        **{"model": MODEL, "prompt": PROMPT, "max_tokens": 32, "temperature": 0.0, "seed": 7} | options
    )


def test_both_models_are_ours(running: Running) -> None:
    architectures = {line["architecture"] for line in running.server.served()}
    assert architectures == {"Qwen3NextForCausalLM", "Qwen3NextMTP"}


def test_streaming_gives_the_text_of_a_whole_answer(running: Running) -> None:
    whole = complete(running).choices[0].text
    parts = [chunk.choices[0].text for chunk in complete(running, stream=True) if chunk.choices]
    assert whole.strip()
    assert len(parts) > 1
    assert "".join(parts) == whole


def test_stop_string_ends_the_text_before_it(running: Running) -> None:
    whole = complete(running, max_tokens=48).choices[0].text
    stop = whole.split()[3]
    choice = complete(running, max_tokens=48, stop=[stop]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == whole[: whole.index(stop)]


def test_log_probs_belong_to_the_tokens(running: Running) -> None:
    choice = complete(running, logprobs=3, max_tokens=12).choices[0]
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    for token, given, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert given == top[token] == max(top.values()), "greedy takes the most likely token"
        assert given <= 0.0


def test_sampling_is_seeded_and_varies(running: Running) -> None:
    options = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 24}
    assert complete(running, **options).choices[0].text == complete(running, **options).choices[0].text
    texts = {complete(running, **options | {"seed": seed}).choices[0].text for seed in range(4)}
    assert len(texts) > 1


def test_chat_streams(running: Running) -> None:
    stream = running.client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=32, temperature=0.0, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    text = "".join((delta.content or "") + (getattr(delta, "reasoning", None) or "") for delta in deltas)
    assert text.strip()


def test_reasoning_parser_separates_thoughts_from_the_answer(running: Running) -> None:
    answer = running.client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        max_tokens=64,
        temperature=0.0,
        extra_body={"structured_outputs": {"regex": "<think>soon</think>never"}},
    )
    message = answer.choices[0].message
    assert getattr(message, "reasoning", None) == "soon" or message.model_extra.get("reasoning_content") == "soon"
    assert message.content == "never"


def test_named_tool_is_called_with_json_arguments(running: Running) -> None:
    answer = running.client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=64,
        temperature=0.0,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments), dict)


def test_wrong_request_is_refused_and_the_server_goes_on(running: Running) -> None:
    with pytest.raises(Exception, match="max_model_len"):
        complete(running, max_tokens=5000)
    assert complete(running).choices[0].text


def test_metrics_count_accepted_and_rejected_drafts(running: Running) -> None:
    metrics = running.server.metrics()
    assert 0 < metrics.accepted < metrics.drafted
