"""Reads the answers of vLLM, SGLang and other OpenAI-compatible servers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qnext_plugins.cli.compare.report import Answer

Shape = TypeVar("Shape", bound=BaseModel)
Choice = TypeVar("Choice")
Scored = tuple[list[float], list[float | None]]
"""Log-probability of each given token, and the gap of the best two at its place."""


class SideError(Exception):
    """One line about what a side did not do."""


class RefusedError(SideError):
    """The server does not take the request as it is."""


class _LogProbs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(BaseModel):
    text: str
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: Any = None


class _Completion(BaseModel):
    choices: list[_Choice]


class _Top(BaseModel):
    logprob: float


class _ChatToken(BaseModel):
    token: str
    logprob: float
    top_logprobs: list[_Top] = []


class _ChatLogProbs(BaseModel):
    content: list[_ChatToken] | None = None


class _Message(BaseModel):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _ChatChoice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: Any = None
    token_ids: list[int] | None = None  # vLLM
    response_token_ids: list[int] | None = None  # SGLang
    prompt_token_ids: list[int] | None = None  # SGLang


class _Chat(BaseModel):
    choices: list[_ChatChoice]
    prompt_token_ids: list[int] | None = None  # vLLM


class _Usage(BaseModel):
    completion_tokens: int | None = None


class _Piece(BaseModel):
    text: str | None = None
    delta: _Message | None = None
    finish_reason: str | None = None


class _Event(BaseModel):
    choices: list[_Piece] | None = None
    usage: _Usage | None = None


class _PromptToken(BaseModel):
    logprob: float
    rank: int | None = None


class _VllmChoice(BaseModel):
    prompt_logprobs: list[dict[str, _PromptToken] | None]


class _VllmScore(BaseModel):
    choices: list[_VllmChoice]


class _SglangMeta(BaseModel):
    input_token_logprobs: list[tuple[float | None, int, str | None]]
    input_top_logprobs: list[list[tuple[float, int, str | None]] | None]


class _SglangScore(BaseModel):
    meta_info: _SglangMeta


def _validated(shape: type[Shape], payload: Any, what: str) -> Shape:
    """``payload`` in its expected shape; raises SideError that names the first thing that is not so."""
    try:
        return shape.model_validate(payload)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "all of it"
        raise SideError(f"{what} is not as expected at {where}: {first['msg']}") from error


def _log_probs(shape: type[Shape], given: Any) -> Shape | None:
    """Log-probabilities in the published shape; None where there are none, or in a shape of the server's own."""
    try:
        return None if given is None else shape.model_validate(given)
    except ValidationError:
        return None


def _first(choices: list[Choice], what: str) -> Choice:
    if not choices:
        raise SideError(f"{what} has no choices")
    return choices[0]


def _gap(best: list[float]) -> float | None:
    """Difference of the two largest; None if there are not two."""
    ordered = sorted((number for number in best if math.isfinite(number)), reverse=True)
    return ordered[0] - ordered[1] if len(ordered) > 1 else None


def read_completion(prompt: int, payload: Any) -> Answer:
    """The answer of /v1/completions; raises SideError."""
    choice = _first(_validated(_Completion, payload, "the completion").choices, "the completion")
    answer = Answer(
        prompt=prompt,
        prompt_ids=choice.prompt_token_ids,
        ids=choice.token_ids,
        text=choice.text,
        finish_reason=choice.finish_reason,
    )
    given = _log_probs(_LogProbs, choice.logprobs)
    # Without a number for every token the numbers have no places.
    if given is not None and None not in given.token_logprobs:
        answer.texts = given.tokens
        answer.log_probs = [number for number in given.token_logprobs if number is not None]
        answer.gaps = [_gap(list((top or {}).values())) for top in given.top_logprobs or [None] * len(given.tokens)]
    return _consistent(answer)


def read_chat(prompt: int, payload: Any) -> Answer:
    """The answer of /v1/chat/completions; raises SideError."""
    chat = _validated(_Chat, payload, "the chat completion")
    choice = _first(chat.choices, "the chat completion")
    message = choice.message
    answer = Answer(
        prompt=prompt,
        prompt_ids=chat.prompt_token_ids or choice.prompt_token_ids,
        ids=choice.token_ids or choice.response_token_ids,
        text=(message.reasoning or message.reasoning_content or "") + (message.content or ""),
        finish_reason=choice.finish_reason,
    )
    given = _log_probs(_ChatLogProbs, choice.logprobs)
    if given is not None and given.content is not None:
        content = given.content
        answer.texts = [token.token for token in content]
        answer.log_probs = [token.logprob for token in content]
        answer.gaps = [_gap([top.logprob for top in token.top_logprobs]) for token in content]
    return _consistent(answer)


@dataclass(frozen=True)
class Event:
    """A piece of a streamed answer."""

    text: str
    finished: bool
    tokens: int | None
    """How many there are in all; None where it does not say it."""


def read_event(payload: Any) -> Event:
    """A piece of a stream of completions or of a chat; raises SideError."""
    event = _validated(_Event, payload, "a piece of the stream")
    texts: list[str | None] = []
    for choice in event.choices or []:
        delta = choice.delta or _Message()
        texts += [choice.text, delta.content, delta.reasoning, delta.reasoning_content]
    return Event(
        text="".join(text for text in texts if text),
        finished=any(choice.finish_reason for choice in event.choices or []),
        tokens=event.usage.completion_tokens if event.usage is not None else None,
    )


def _consistent(answer: Answer) -> Answer:
    """``answer`` with lists of one length; raises SideError if they are not."""
    _check_finite(answer.log_probs or [], "the answer")
    lists = {"token ids": answer.ids, "token texts": answer.texts, "log-probabilities": answer.log_probs}
    lengths = {name: len(entries) for name, entries in lists.items() if entries is not None}
    if len(set(lengths.values())) > 1:
        raise SideError(f"the answer has {', '.join(f'{count} {name}' for name, count in lengths.items())}")
    return answer


def _check_finite(log_probs: list[float], what: str) -> None:
    """Raise SideError where a number is none: nothing can be compared with it, and every comparison would pass."""
    broken = next((number for number in log_probs if not math.isfinite(number)), None)
    if broken is not None:
        raise SideError(f"{what} has a log-probability of {broken}")


def read_vllm_score(prompt_ids: list[int], ids: list[int], payload: Any) -> Scored:
    """``prompt_logprobs`` of ``prompt_ids + ids`` as vLLM gives them, those of ``ids``; raises SideError."""
    what = "the answer with prompt_logprobs"
    choice = _first(_validated(_VllmScore, payload, what).choices, what)
    entries = choice.prompt_logprobs[len(prompt_ids) :]
    if len(entries) != len(ids):
        raise SideError(f"{what} scores {len(choice.prompt_logprobs)} tokens of {len(prompt_ids) + len(ids)}")
    log_probs, gaps = [], []
    for token, entry in zip(ids, entries, strict=True):
        if entry is None or str(token) not in entry:
            raise SideError(f"{what} does not score token {token}")
        log_probs.append(entry[str(token)].logprob)
        gaps.append(_gap([scored.logprob for scored in entry.values()]))
    _check_finite(log_probs, what)
    return log_probs, gaps


def read_sglang_score(prompt_ids: list[int], ids: list[int], payload: Any) -> Scored:
    """``input_token_logprobs`` of ``prompt_ids + ids`` as SGLang gives them, those of ``ids``; raises SideError."""
    meta = _validated(_SglangScore, payload, "the answer of /generate").meta_info
    given = meta.input_token_logprobs[len(prompt_ids) :]
    if [token for _, token, _ in given] != ids:
        raise SideError(f"/generate scores {len(meta.input_token_logprobs)} of {len(prompt_ids) + len(ids)} tokens")
    log_probs = [number for number, _, _ in given if number is not None]
    if len(log_probs) != len(ids):
        raise SideError("/generate leaves tokens of the continuation without a number")
    _check_finite(log_probs, "the answer of /generate")
    tops = meta.input_top_logprobs[len(prompt_ids) :]
    gaps = [_gap([number for number, _, _ in top or []]) for top in tops]
    return log_probs, gaps
