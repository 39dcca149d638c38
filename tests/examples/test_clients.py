"""The clients of ``examples/`` on real servers: the protocol, for nobody can say what the tiny checkpoint answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest
from openai import DefaultHttpxClient, OpenAI

from examples.openai_client import Session, ask, log_probs, run_tool, stream, use_tool
from examples.serving_demo import MODEL, free_port
from tests.examples.conftest import Served

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTION = "What is a coroutine?"
OFFSETS = (-8, 0, 1, 8)


def run(python: str, script: str, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [python, str(EXAMPLES / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def session(served: Served) -> Session:
    client = OpenAI(base_url=served.url, api_key="none", max_retries=0, http_client=DefaultHttpxClient(trust_env=False))
    return Session(client, MODEL, served.request)


def clients_python() -> str:
    """The Python that has Qwen-Agent."""
    given = os.environ.get("QNEXT_CLIENTS_PYTHON")
    if given is None and find_spec("qwen_agent") is None:
        pytest.skip("QNEXT_CLIENTS_PYTHON: expected the Python of an environment with Qwen-Agent")
    return given or sys.executable


def test_a_stream_arrives_in_pieces_that_make_the_answer(served: Served) -> None:
    pieces = [piece for piece in stream(session(served), QUESTION) if piece]
    assert len(pieces) > 1
    assert "".join(pieces) == ask(session(served), QUESTION)


def test_a_required_tool_is_called_with_arguments_of_its_schema_and_its_result_goes_back(served: Served) -> None:
    uses = use_tool(session(served), "What time is it in Shanghai?")
    assert uses
    for use in uses:
        assert use.name == "now"
        offset = json.loads(use.arguments)["utc_offset"]
        assert offset in OFFSETS
        assert datetime.fromisoformat(use.result).utcoffset() == timedelta(hours=offset)
        assert isinstance(use.answer, str)


def test_log_probs_are_of_the_likeliest_tokens_and_make_the_answer(served: Served) -> None:
    tokens = log_probs(session(served), QUESTION)
    text = "".join(token for token, _, _ in tokens)
    # SGLang gives the token that ends the text too.
    assert text.removesuffix("<|im_end|>").strip() == ask(session(served), QUESTION).strip()
    for token, given, top in tokens:
        assert len(top) == 2
        assert given == top[token] == max(top.values()) <= 0.0


def test_openai_client_shows_all_four(served: Served, direct: dict[str, str]) -> None:
    done = run(sys.executable, "openai_client.py", served.url, *served.options, environment=direct)
    assert done.returncode == 0, done.stderr
    assert f"Model: {MODEL}" in done.stdout
    assert re.search(r"^now\(\{.*\}\) gives \d{4}-\d\d-\d\dT", done.stdout, re.M)
    assert re.search(r"^ *'.+' +-\d+\.\d{4} ", done.stdout, re.M)


def assistant(served: Served, environment: dict[str, str], answer: str) -> subprocess.CompletedProcess[str]:
    """One turn of Qwen-Agent's Assistant, in which a grammar makes the model's answer one that matches ``answer``."""
    grammar = {"structured_outputs": {"regex": answer}} if served.engine == "vllm" else {"regex": answer}
    fields = json.dumps({"max_tokens": 96, "temperature": 0, "extra_body": grammar})
    python, environment = clients_python(), environment | {"QWEN_AGENT_MAX_LLM_CALL_PER_RUN": "1"}
    return run(python, "qwen_agent_assistant.py", served.url, "--request", fields, environment=environment)


def call_of(tool: str, arguments: str) -> str:
    """A pattern of the call that Qwen-Agent looks for."""
    return rf'<tool_call>\n\{{"name": "{tool}", "arguments": \{{{arguments}\}}\}}\n</tool_call>'


def test_qwen_agent_runs_its_own_tool(served: Served, direct: dict[str, str]) -> None:
    done = assistant(served, direct, call_of("weekday", '"days": [0-6]'))
    assert done.returncode == 0, done.stderr
    (days,) = re.findall(r'^-> weekday\(\{"days": (\d)\}\)$', done.stdout, re.M)
    (day,) = re.findall(r"^<- weekday: (.+)$", done.stdout, re.M)
    # Midnight may have come between.
    assert day in {f"{datetime.now() + timedelta(days=int(days) - late):%A}" for late in (0, 1)}


def test_qwen_agent_runs_a_tool_of_the_mcp_server(served: Served, direct: dict[str, str]) -> None:
    done = assistant(served, direct, call_of("clock-now", '"utc_offset": (0|1|8)'))
    assert done.returncode == 0, done.stderr
    (offset,) = re.findall(r'^-> clock-now\(\{"utc_offset": (\d)\}\)$', done.stdout, re.M)
    (time,) = re.findall(r"^<- clock-now: (.+)$", done.stdout, re.M)
    assert datetime.fromisoformat(time).utcoffset() == timedelta(hours=int(offset))


def test_qwen_agent_prints_an_answer_in_words(served: Served, direct: dict[str, str]) -> None:
    done = assistant(served, direct, "[a-z]{3,8} [a-z]{3,8}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^[a-z]{3,8} [a-z]{3,8}$", done.stdout, re.M), done.stdout


def test_a_request_that_the_server_refuses_is_one_line(served: Served, direct: dict[str, str]) -> None:
    too_long = json.dumps({"max_tokens": 100_000})
    done = run(sys.executable, "openai_client.py", served.url, "--request", too_long, environment=direct)
    assert done.returncode == 1
    assert re.fullmatch(rf"openai_client: {re.escape(served.url)} refused the request \(400\): .+\n", done.stderr)


def test_without_a_server_each_client_says_so_in_one_line(direct: dict[str, str]) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    done = run(sys.executable, "openai_client.py", url, environment=direct)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"openai_client: no server answers at {re.escape(url)} \(.+\)\n", done.stderr)


def test_without_a_server_the_assistant_says_so_in_one_line(direct: dict[str, str]) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    done = run(clients_python(), "qwen_agent_assistant.py", url, environment=direct)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"qwen_agent_assistant: no server answers at {re.escape(url)} \(.+\)\n", done.stderr)


@pytest.mark.parametrize("script", ["openai_client.py", "qwen_agent_assistant.py"])
@pytest.mark.parametrize("value", ["[]", "{", '"a"'])
def test_a_request_that_is_no_object_is_refused(script: str, value: str, direct: dict[str, str]) -> None:
    done = run(sys.executable, script, "http://127.0.0.1:1/v1", "--request", value, environment=direct)
    assert done.returncode == 2
    assert "--request" in done.stderr
    assert "expected a JSON object" in done.stderr


def test_a_server_of_something_else_is_one_line(tmp_path: Path, direct: dict[str, str]) -> None:
    (tmp_path / "models").write_text("<html>")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        done = run(sys.executable, "openai_client.py", f"http://127.0.0.1:{server.server_port}", environment=direct)
        server.shutdown()
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith("expected a list of models at /models, got none; is /v1 missing?")


@pytest.mark.parametrize(
    "arguments", ["", "[]", "{}", '{"utc_offset": "here"}', '{"utc_offset": 1e99}', '{"other": 1}']
)
def test_arguments_that_a_tool_cannot_take_are_told_to_the_model(arguments: str) -> None:
    assert run_tool(arguments).startswith("error: ")
