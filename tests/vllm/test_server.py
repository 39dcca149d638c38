"""``vllm serve`` with its default flags and speculation: the engine's own features, unharmed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from examples.demo_vllm import Server
from examples.serving_demo import MODEL
from tests.checkpoints import TINY
from tests.completions import CHAT, Completions, Running, complete, connect

pytestmark = pytest.mark.vllm

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


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    flags = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
    # The checkpoint does not think: a grammar writes its thoughts, which vLLM by default leaves free.
    flags += ("--structured-outputs-config", '{"enable_in_reasoning": true}')
    with Server(TINY, log, speculative=True, flags=flags) as server:
        yield connect(server)


def test_both_models_are_ours(running: Running) -> None:
    architectures = {line["architecture"] for line in running.server.served()}
    assert architectures == {"Qwen3NextForCausalLM", "Qwen3NextMTP"}


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


class TestCompletions(Completions):
    pass
