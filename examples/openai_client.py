#!/usr/bin/env python3
"""Talk to an OpenAI-compatible server of vLLM or SGLang: a chat, a stream, a tool call, log-probabilities.

python examples/openai_client.py http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Annotated, Any, NamedTuple

import typer
from openai import APIConnectionError, APIStatusError, OpenAI, OpenAIError

CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "now",
        "description": "The date and time of day, so many hours east of Greenwich",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"utc_offset": {"type": "integer", "enum": [-8, 0, 1, 8]}},
            "required": ["utc_offset"],
            "additionalProperties": False,
        },
    },
}


class Session(NamedTuple):
    """A server's model, and the fields that every request carries beside its own."""

    client: OpenAI
    model: str
    request: dict[str, Any]

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        """The answer to a chat, or the chunks of it with ``stream=True``."""
        fields: dict[str, Any] = {"model": self.model, "messages": messages, "max_tokens": 64, "temperature": 0.0}
        return self.client.chat.completions.create(**fields | self.request | options)


class ToolUse(NamedTuple):
    """A call that the model asked for, what the tool gave, and what the model made of it."""

    name: str
    arguments: str
    result: str
    answer: str


def first_model(client: OpenAI) -> str:
    """The first model that a server has; raises OpenAIError if it names none."""
    try:
        return client.models.list().data[0].id
    except (AttributeError, IndexError):
        raise OpenAIError("expected a list of models at /models, got none; is /v1 missing?") from None


def now(utc_offset: int) -> str:
    """What the tool does."""
    return datetime.now(timezone(timedelta(hours=utc_offset))).isoformat(timespec="seconds")


def run_tool(arguments: str) -> str:
    """The tool's result for arguments as the model wrote them; a model is told what it got wrong."""
    try:
        return now(**json.loads(arguments))
    except (TypeError, ValueError, OverflowError) as error:
        return f"error: {error}"


def ask(session: Session, question: str) -> str:
    """One question, one answer."""
    return session.chat([{"role": "user", "content": question}]).choices[0].message.content or ""


def stream(session: Session, question: str) -> Iterator[str]:
    """The pieces of an answer as they arrive."""
    for chunk in session.chat([{"role": "user", "content": question}], stream=True):
        for choice in chunk.choices:
            yield choice.delta.content or ""


def use_tool(session: Session, question: str) -> list[ToolUse]:
    """Make the model call the tool, run it, hand the results back."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    message = session.chat(messages, tools=[CLOCK], tool_choice="required").choices[0].message
    calls = [(call, run_tool(call.function.arguments)) for call in message.tool_calls or []]
    messages.append(message.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True))
    messages += [{"role": "tool", "tool_call_id": call.id, "content": result} for call, result in calls]
    answer = session.chat(messages, tools=[CLOCK], tool_choice="none").choices[0].message.content or ""
    return [ToolUse(call.function.name, call.function.arguments, result, answer) for call, result in calls]


def log_probs(session: Session, question: str) -> list[tuple[str, float, dict[str, float]]]:
    """For each token of an answer: the token, its log-probability, and those of the likeliest two."""
    answer = session.chat([{"role": "user", "content": question}], logprobs=True, top_logprobs=2)
    return [
        (token.token, token.logprob, {top.token: top.logprob for top in token.top_logprobs})
        for token in answer.choices[0].logprobs.content
    ]


def show(session: Session, question: str) -> None:
    """All four, printed."""
    print(f"Model: {session.model}\n\nChat: {question}\n{ask(session, question)}\n\nThe same, streamed:")
    for piece in stream(session, question):
        print(piece, end="", flush=True)
    print("\n\nTool call: What time is it in Shanghai?")
    for use in use_tool(session, "What time is it in Shanghai?"):
        print(f"{use.name}({use.arguments}) gives {use.result}; the model says: {use.answer}")
    print("\nLog-probabilities of the first tokens, with the likeliest two:")
    for token, given, top in log_probs(session, question)[:8]:
        print(f"{token!r:>16} {given:8.4f}   {'  '.join(f'{other!r} {value:.4f}' for other, value in top.items())}")


def main(
    url: Annotated[str, typer.Argument(help="Of the server's API, as http://127.0.0.1:8000/v1.")],
    model: Annotated[str | None, typer.Option(help="By default the first that the server has.")] = None,
    prompt: Annotated[str, typer.Option(help="The question.")] = "What is a coroutine?",
    api_key: Annotated[str, typer.Option(help="For servers that ask for one.")] = "none",
    request: Annotated[str, typer.Option(help="Further fields of every request, a JSON object.")] = "{}",
) -> None:
    """Talk to an OpenAI-compatible server: a chat, a stream, a tool call, log-probabilities."""
    try:
        fields = json.loads(request)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise typer.BadParameter(f"expected a JSON object, got {request!r}", param_hint="--request")
    client = OpenAI(base_url=url, api_key=api_key, max_retries=0)
    try:
        show(Session(client, model or first_model(client), fields), prompt)
    except APIConnectionError as error:
        sys.exit(f"openai_client: no server answers at {url} ({error.__cause__ or error})")
    except APIStatusError as error:
        sys.exit(f"openai_client: {url} refused the request ({error.status_code}): {error.message}")
    except OpenAIError as error:
        sys.exit(f"openai_client: {url}: {error}")


if __name__ == "__main__":
    typer.run(main)
