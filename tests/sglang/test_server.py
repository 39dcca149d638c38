"""SGLang's server with the plugin's defaults and speculation: the engine's own features, unharmed."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError
from transformers import AutoTokenizer

from examples.demo_sglang import Server
from examples.serving_demo import MODEL, DemoError
from tests.checkpoints import TINY
from tests.completions import CHAT, Completions, Running, complete, connect

pytestmark = pytest.mark.sglang

UNKNOWN = "Once upon a time"
# The checkpoint does not think: a grammar writes its thoughts, which SGLang leaves free where it expects them.
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer", "enum": [1, 2]}},
            "required": ["days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    flags = ("--enable-cache-report", "--tool-call-parser", "qwen25", "--reasoning-parser", "qwen3")
    with Server(TINY, log, speculative=True, flags=flags) as server:
        yield connect(server)


def chat(running: Running, *, grammar: dict[str, Any] | None = None, **options: object):
    return running.client.chat.completions.create(
        **{"model": MODEL, "messages": CHAT, "max_tokens": 64, "temperature": 0.0} | options,
        extra_body=NO_THINKING | (grammar or {}),
    )


def no_spaces() -> dict[str, float]:
    """A bias: between the parts of JSON a grammar allows any number of spaces, and the checkpoint likes them."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return {str(token): -100.0 for token in range(len(tokenizer)) if tokenizer.decode([token]).isspace()}


def generate(running: Running, ids: list[int], max_tokens: int, **options: object) -> dict[str, Any]:
    request = {"input_ids": ids, "sampling_params": {"temperature": 0.0, "max_new_tokens": max_tokens}} | options
    answer = httpx.post(f"{running.server.url}/generate", json=request, timeout=60, trust_env=False)
    return answer.raise_for_status().json()


def lines_of_failed_start(checkpoint: Path, log: Path, *flags: str) -> list[str]:
    with Server(checkpoint, log, speculative=True, flags=flags) as server:
        with pytest.raises(DemoError, match="ended with status"):
            server.wait()
        assert server.process.returncode != 0
    return server.lines()


# The two that start no server come first, while none is running beside them.
def test_flag_that_is_not_served_ends_the_start_and_is_named(tmp_path: Path) -> None:
    lines = lines_of_failed_start(TINY, tmp_path / "log.txt", "--speculative-eagle-topk", "2")
    assert any("qnext-plugins" in line and "--speculative-eagle-topk 2" in line for line in lines)


def test_config_without_the_interval_ends_the_start_and_says_how_to_mend_it(tmp_path: Path) -> None:
    checkpoint = shutil.copytree(TINY, tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    del config["full_attention_interval"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    lines = lines_of_failed_start(checkpoint, tmp_path / "log.txt")
    assert any(
        "full_attention_interval is missing" in line and 'add "full_attention_interval": 4' in line for line in lines
    )


def test_both_models_are_ours(running: Running) -> None:
    architectures = {line["architecture"] for line in running.server.served()}
    assert architectures == {"Qwen3NextForCausalLM", "Qwen3NextForCausalLMMTP"}


def test_log_says_what_the_plugin_chose(running: Running) -> None:
    assert any("qnext-plugins chose for this CPU: attention_backend=qnext" in line for line in running.server.lines())


def test_log_probs_of_a_chat_belong_to_the_tokens(running: Running) -> None:
    choice = chat(running, logprobs=True, top_logprobs=2, max_tokens=12).choices[0]
    assert choice.logprobs is not None
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    for token in choice.logprobs.content:
        assert token.logprob == max(top.logprob for top in token.top_logprobs), "greedy takes the most likely token"
        assert token.token in {top.token for top in token.top_logprobs}


def test_generate_gives_verified_tokens_the_log_probs_of_a_prefill(running: Running) -> None:
    prompt, count = list(range(100, 140)), 24
    written = generate(running, prompt, count, return_logprob=True)
    ids, meta = written["output_ids"], written["meta_info"]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == ids
    assert len(ids) == count
    assert meta["spec_verify_ct"] > 0
    read = generate(running, prompt + ids, 1, return_logprob=True, logprob_start_len=0)["meta_info"]
    assert [token for _, token, _ in read["input_token_logprobs"]] == prompt + ids
    prefilled = [given for given, _, _ in read["input_token_logprobs"][len(prompt) :]]
    # bfloat16.
    assert [given for given, _, _ in meta["output_token_logprobs"]] == pytest.approx(prefilled, abs=0.1)


def test_sampling_varies_and_takes_the_likeliest_token_if_it_must(running: Running) -> None:
    options = {"prompt": UNKNOWN, "temperature": 1.0, "max_tokens": 24}
    greedy = complete(running, **options | {"temperature": 0.0}).choices[0].text
    assert complete(running, **options, extra_body={"top_k": 1}).choices[0].text == greedy
    assert len({complete(running, **options).choices[0].text for _ in range(4)}) > 1


def test_parallel_samples_of_one_prompt(running: Running) -> None:
    sampled = complete(running, prompt=UNKNOWN, n=3, temperature=1.0).choices
    assert [choice.index for choice in sampled] == [0, 1, 2]
    assert len({choice.text for choice in sampled}) > 1
    alone = complete(running).choices[0].text
    assert [choice.text for choice in complete(running, n=2).choices] == [alone, alone]


def test_chat_streams(running: Running) -> None:
    whole = chat(running, max_tokens=32).choices[0].message.content
    deltas = [chunk.choices[0].delta.content for chunk in chat(running, max_tokens=32, stream=True) if chunk.choices]
    assert whole.strip()
    assert "".join(delta or "" for delta in deltas) == whole


def test_reasoning_parser_separates_thoughts_from_the_answer(running: Running) -> None:
    message = chat(running, grammar={"regex": "<think>soon</think>never"}).choices[0].message
    assert message.model_extra["reasoning_content"] == "soon"
    assert message.content == "never"


def test_tool_call_parser_reads_the_call_from_the_text(running: Running) -> None:
    call = r'<tool_call>\n\{"name": "get_weather", "arguments": \{"days": [12]\}\}\n</tool_call>'
    choice = chat(running, tools=[WEATHER], grammar={"regex": call}).choices[0]
    assert choice.finish_reason == "tool_calls"
    (called,) = choice.message.tool_calls
    assert called.function.name == "get_weather"
    assert json.loads(called.function.arguments)["days"] in (1, 2)


def test_named_tool_is_called_with_arguments_of_its_schema(running: Running) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    choice = chat(running, tools=[WEATHER], tool_choice=named, logit_bias=no_spaces()).choices[0]
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["days"] in (1, 2)


def test_structured_output_follows_a_regular_expression(running: Running) -> None:
    pattern = "([a-z]{3}[0-9]{2} ){6}"
    for temperature in (0.0, 1.0):
        text = complete(running, temperature=temperature, max_tokens=64, extra_body={"regex": pattern}).choices[0].text
        assert re.fullmatch(pattern, text)


def test_structured_output_follows_a_json_schema(running: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["list", "tuple"]}, "length": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["kind", "length"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    choice = chat(running, response_format=wanted, logit_bias=no_spaces()).choices[0]
    assert choice.finish_reason == "stop"
    answer = json.loads(choice.message.content)
    assert answer.keys() == {"kind", "length"}
    assert answer["kind"] in ("list", "tuple")
    assert 1 <= answer["length"] <= 9


def test_usage_counts_the_tokens_of_a_cached_prefix(running: Running) -> None:
    text = "\n".join(f"{number}. A prompt that no other test has." for number in range(40))
    first, second = (complete(running, prompt=prompt).usage for prompt in (text, f"{text}\nAnd more."))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert 0 < second.prompt_tokens_details.cached_tokens < second.prompt_tokens


def test_client_that_leaves_does_not_disturb_the_server(running: Running) -> None:
    whole = complete(running).choices[0].text
    stream = complete(running, prompt=UNKNOWN, max_tokens=1900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    assert complete(running).choices[0].text == whole
    limit = time.monotonic() + 20
    while "sglang:num_aborted_requests_total{" not in running.server.get("/metrics"):
        assert time.monotonic() < limit, "the request goes on without its client"
        time.sleep(0.2)
    assert complete(running).choices[0].text == whole


def test_wrong_request_is_refused_and_the_server_goes_on(running: Running) -> None:
    with pytest.raises(BadRequestError, match="maximum context length"):
        complete(running, max_tokens=5000)
    assert complete(running).choices[0].text


class TestCompletions(Completions):
    pass


def test_weights_that_are_loaded_again_serve_as_before(running: Running) -> None:
    ids = AutoTokenizer.from_pretrained(TINY)(UNKNOWN)["input_ids"]
    before = generate(running, ids, 24)["output_ids"]
    request = {"model_path": str(TINY), "flush_cache": True}
    answer = httpx.post(f"{running.server.url}/update_weights_from_disk", json=request, timeout=120, trust_env=False)
    assert answer.json()["success"], answer.text
    assert generate(running, ids, 24)["output_ids"] == before
