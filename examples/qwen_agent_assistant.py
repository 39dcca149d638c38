#!/usr/bin/env python3
"""Qwen-Agent's Assistant on a server of vLLM or SGLang, with a tool of its own and one from an MCP server.

python examples/qwen_agent_assistant.py http://127.0.0.1:8000/v1

Needs `pip install qwen-agent python-dotenv "mcp<2"`, in an environment of its own beside vLLM, which needs mcp 2.
Qwen-Agent writes the tools into the prompt and reads the calls out of the answer itself; the server needs no flags.
"""

from __future__ import annotations

import json
import sys
from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from openai import APIConnectionError, APIStatusError, OpenAI, OpenAIError

CLOCK_SERVER = Path(__file__).resolve().with_name("mcp_clock_server.py")
QUESTION = "What time is it in Shanghai, and which day of the week is it in three days?"


def make_assistant(url: str, model: str, api_key: str, request: dict[str, Any]) -> Any:
    """An Assistant with the tools `weekday` and `clock-now`; every request also carries the fields of ``request``."""
    from qwen_agent.agents import Assistant
    from qwen_agent.tools.base import BaseTool

    class Weekday(BaseTool):
        name = "weekday"
        description = "The day of the week, so many days from today"
        parameters = {  # noqa: RUF012 (the base class declares it so)
            "type": "object",
            "properties": {"days": {"type": "integer", "minimum": 0, "maximum": 6}},
            "required": ["days"],
        }

        def call(self, params: str | dict, **_: Any) -> str:
            days = self._verify_json_format_args(params)["days"]
            return (date.today() + timedelta(days=days)).strftime("%A")

    generate = {"max_tokens": 512, **request}
    return Assistant(
        llm={"model": model, "model_type": "oai", "model_server": url, "api_key": api_key, "generate_cfg": generate},
        system_message="Use the tools where they help.",
        function_list=[
            Weekday(),
            {"mcpServers": {"clock": {"command": sys.executable, "args": [str(CLOCK_SERVER)]}}},
        ],
    )


def first_model(client: OpenAI) -> str:
    """The first model that a server has; raises OpenAIError if it names none."""
    try:
        return client.models.list().data[0].id
    except (AttributeError, IndexError):
        raise OpenAIError("expected a list of models at /models, got none; is /v1 missing?") from None


def show(message: dict[str, Any]) -> None:
    """Print a message of the conversation."""
    if call := message.get("function_call"):
        print(f"-> {call['name']}({call['arguments']})")
    elif message["role"] == "function":
        print(f"<- {message['name']}: {message['content']}")
    else:
        print(message["content"] or message.get("reasoning_content") or "(nothing)")


def main(
    url: Annotated[str, typer.Argument(help="Of the server's API, as http://127.0.0.1:8000/v1.")],
    model: Annotated[str | None, typer.Option(help="By default the first that the server has.")] = None,
    prompt: Annotated[str, typer.Option(help="The question.")] = QUESTION,
    api_key: Annotated[str, typer.Option(help="For servers that ask for one.")] = "EMPTY",
    request: Annotated[str, typer.Option(help="Further fields of every request, a JSON object.")] = "{}",
) -> None:
    """Let Qwen-Agent's Assistant answer a question with a tool of its own and one from an MCP server."""
    try:
        fields = json.loads(request)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise typer.BadParameter(f"expected a JSON object, got {request!r}", param_hint="--request")
    try:
        import mcp.client.streamable_http
        from qwen_agent.llm.base import ModelServiceError

        if not hasattr(mcp.client.streamable_http, "streamablehttp_client"):
            raise ImportError("this is mcp 2, and Qwen-Agent needs mcp 1")
    except ImportError as error:
        sys.exit(f'qwen_agent_assistant: {error}: pip install qwen-agent python-dotenv "mcp<2" (not beside vLLM)')
    try:
        model = model or first_model(OpenAI(base_url=url, api_key=api_key, max_retries=0))
        assistant = make_assistant(url, model, api_key, fields)
        # Each time it gives the whole answer so far.
        *_, answer = assistant.run([{"role": "user", "content": prompt}])
        for message in answer:
            show(message)
    except APIConnectionError as error:
        sys.exit(f"qwen_agent_assistant: no server answers at {url} ({error.__cause__ or error})")
    except APIStatusError as error:
        sys.exit(f"qwen_agent_assistant: {url} refused the request ({error.status_code}): {error.message}")
    except (ModelServiceError, OpenAIError) as error:
        sys.exit(f"qwen_agent_assistant: {url}: {error}")


if __name__ == "__main__":
    typer.run(main)
