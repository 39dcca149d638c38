"""The prompts that every side gets."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from pydantic import ValidationError

from qnext_plugins.cli.compare.report import Prompt


class PromptsError(ValueError):
    """One line about a file of prompts."""


def load_prompts(file: Path | None = None, *, limit: int | None = None, chat: bool = False) -> list[Prompt]:
    """Prompts of a JSONL file, or the 32 that come with the package, the first ``limit`` of them.

    A line is an object with ``prompt`` (a text to continue) or ``messages`` (a conversation to answer); empty lines are
    skipped. With ``chat`` every text becomes the message of a user. Raises PromptsError, which names the line.
    """
    source = file or files(__package__).joinpath("prompts.jsonl")
    try:
        text = source.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"{source}: expected a JSONL file, and it cannot be read ({error})") from error
    prompts = [
        _read_line(line, f"{source}, line {number}")
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]
    if not prompts:
        raise PromptsError(f"{source}: expected at least one prompt, and there is none")
    if chat:
        prompts = [_as_chat(prompt) for prompt in prompts]
    return prompts[:limit]


def _read_line(line: str, where: str) -> Prompt:
    try:
        prompt = Prompt.model_validate(json.loads(line))
    except json.JSONDecodeError as error:
        raise PromptsError(f"{where}: expected a JSON object, got {line[:60]!r}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise PromptsError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if bool(prompt.prompt) == bool(prompt.messages):
        raise PromptsError(f"{where}: expected either prompt or messages, and not empty, got {line[:60]!r}")
    return prompt


def _as_chat(prompt: Prompt) -> Prompt:
    if prompt.messages is not None:
        return prompt
    return Prompt(messages=[{"role": "user", "content": prompt.prompt}])


def marked(prompt: Prompt, mark: str) -> Prompt:
    """``prompt`` behind ``mark``, so that no cache of prefixes knows it."""
    if prompt.messages is None:
        return Prompt(prompt=f"{mark} {prompt.prompt}")
    first, *rest = prompt.messages
    return Prompt(messages=[first | {"content": f"{mark} {first.get('content', '')}"}, *rest])
