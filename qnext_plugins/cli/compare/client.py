"""Talks to one server: greedy continuations, scores of given tokens, timed streams, counters."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from qnext_plugins.cli.compare.answers import (
    Event,
    RefusedError,
    Scored,
    SideError,
    read_chat,
    read_completion,
    read_event,
    read_sglang_score,
    read_vllm_score,
)
from qnext_plugins.cli.compare.report import Answer, Drafts, Prompt

LOCAL = ("127.0.0.1", "localhost", "[::1]")
# Who a model belongs to, as the servers say it in /v1/models, and how they are talked to.
OWNERS = {"vllm": "vllm", "sglang": "sglang", "transformers": "hf"}
IGNORE_EOS = {"ignore_eos": True}
TOKEN_IDS = {"return_token_ids": True}
# A server of unknown make gets neither: nothing beyond the published interface.


@dataclass(frozen=True)
class About:
    """What a server says of itself."""

    kind: str
    """``vllm``, ``sglang``, ``hf`` or ``openai``."""
    model: str
    versions: dict[str, str]
    dtype: str | None


@dataclass(frozen=True)
class Timing:
    """One streamed request, in seconds from when it was sent."""

    first: float
    last: float
    end: float
    tokens: int
    counted: bool
    """Whether the server counted the tokens; otherwise they are pieces of the stream."""


class Client:
    """A server's client; every method raises SideError, one line, if the server does not do its part."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 120) -> None:
        """``timeout``: seconds that a request may take."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # No proxy of the environment comes between us and a server on this machine.
        trust_env = not any(f"//{host}" in url for host in LOCAL)
        limits = httpx.Limits(max_connections=None)
        self.url = url
        self.timeout = timeout
        self.http = httpx.AsyncClient(
            headers=headers, trust_env=trust_env, timeout=timeout, limits=limits, follow_redirects=True
        )
        self.kind = "openai"
        self.model = ""
        self.served: list[str] = []
        """The models that it names."""
        self.gives_log_probs = True
        self.counts_tokens = True
        """Whether it takes the request to say at the end of a stream how many tokens there were."""

    async def close(self) -> None:
        await self.http.aclose()

    async def about(self, model: str | None = None) -> About:
        """Find out what kind of server it is and which model it serves; ``model`` chooses one of several."""
        async with self._errors():
            response = await self.http.get(f"{self.url}/v1/models")
        owner = None
        try:
            cards = self._json(response)["data"]
            card, self.served = cards[0], [str(each["id"]) for each in cards]
            self.model, owner = model or str(card["id"]), card.get("owned_by")
        except (SideError, LookupError, TypeError, AttributeError) as error:
            # Some servers list nothing and still serve what they are asked for.
            if model is None:
                reason = str(error) if isinstance(error, SideError) else repr(response.text[:80])
                raise SideError(f"{self.url}/v1/models names no model ({reason}): give --model") from error
            self.model = model
        self.kind = OWNERS.get(str(owner), "openai")
        found = await self._versions()
        dtype = found.get("dtype")
        name = "transformers" if self.kind == "hf" else self.kind
        versions = {name: str(found["version"])} if "version" in found else {}
        return About(self.kind, self.model, versions, dtype if isinstance(dtype, str) and dtype != "auto" else None)

    async def _versions(self) -> dict[str, Any]:
        """What the server says of itself beside its models; empty where it says nothing."""
        if self.kind == "openai":
            return {}
        async with self._errors():
            response = await self.http.get(self.url + ("/server_info" if self.kind == "sglang" else "/version"))
        try:
            found = response.json() if response.is_success else {}
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _request(self, prompt: Prompt, max_tokens: int) -> tuple[str, dict[str, Any]]:
        """The path and the fields that every greedy request has."""
        fields: dict[str, Any] = {"model": self.model, "max_tokens": max_tokens, "temperature": 0.0}
        if self.kind != "openai":
            fields |= IGNORE_EOS
        if prompt.messages is not None:
            return "/v1/chat/completions", fields | {"messages": prompt.messages}
        return "/v1/completions", fields | {"prompt": prompt.prompt}

    async def greedy(self, number: int, prompt: Prompt, max_tokens: int) -> Answer:
        """The continuation of a prompt, with log-probabilities and the best two where the server gives them."""
        path, fields = self._request(prompt, max_tokens)
        chat = prompt.messages is not None
        wanted: dict[str, Any] = {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
        if self.kind != "openai":
            wanted |= TOKEN_IDS
        # Others may be asked meanwhile: what counts is what this request wanted.
        asked = self.gives_log_probs
        try:
            payload = await self._post(path, fields | (wanted if asked else {}))
        except RefusedError:
            if self.kind != "openai" or not asked:
                raise
            payload = await self._post(path, fields)
            self.gives_log_probs = False
        return (read_chat if chat else read_completion)(number, payload)

    async def score(self, prompt_ids: list[int], ids: list[int], dtype: str | None = None) -> Scored:
        """Log-probabilities and gaps of ``ids`` after ``prompt_ids``, both read at once.

        ``dtype``: what to compute in, if not what the server runs in; only transformers offers that.
        """
        if self.kind == "sglang":
            fields: dict[str, Any] = {
                "input_ids": prompt_ids + ids,
                "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
                "return_logprob": True,
                "logprob_start_len": 0,
                "top_logprobs_num": 2,
            }
            return read_sglang_score(prompt_ids, ids, await self._post("/generate", fields))
        fields = {"model": self.model, "prompt": prompt_ids + ids, "max_tokens": 1, "temperature": 0.0}
        wanted: dict[str, Any] = {"prompt_logprobs": 2} | ({"prompt_logprobs_dtype": dtype} if dtype else {})
        payload = await self._post("/v1/completions", fields | wanted)
        return read_vllm_score(prompt_ids, ids, payload)

    async def stream(self, prompt: Prompt, max_tokens: int) -> Timing:
        """Stream a continuation and time it."""
        asked = self.counts_tokens
        try:
            return await self._stream(prompt, max_tokens, counted=asked)
        except RefusedError:
            if self.kind != "openai" or not asked:
                raise
            timing = await self._stream(prompt, max_tokens, counted=False)
            self.counts_tokens = False
            return timing

    async def _stream(self, prompt: Prompt, max_tokens: int, *, counted: bool) -> Timing:
        path, fields = self._request(prompt, max_tokens)
        fields["stream"] = True
        if counted:
            fields["stream_options"] = {"include_usage": True}
        start = time.perf_counter()
        first, last, pieces, tokens, finished = 0.0, 0.0, 0, None, False
        async with self._errors(), self.http.stream("POST", self.url + path, json=fields) as response:
            if not response.is_success:
                await response.aread()
                self._json(response)
            async for event in self._events(response):
                if event is None:
                    finished = True
                    continue
                tokens = event.tokens or tokens
                finished |= event.finished
                if event.text:
                    last = time.perf_counter() - start
                    first = first or last
                    pieces += 1
        if not finished:
            raise SideError(f"the stream of {path} ended before its last piece")
        if not pieces:
            raise SideError(f"the stream of {path} had no text")
        return Timing(
            first, last, time.perf_counter() - start, pieces if tokens is None else tokens, tokens is not None
        )

    async def _events(self, response: httpx.Response) -> AsyncIterator[Event | None]:
        """The objects of a stream of server-sent events; None is its mark of the end."""
        async for line in response.aiter_lines():
            kind, colon, data = line.partition(":")
            if not line or not kind or kind in ("event", "id", "retry"):
                continue
            if data.strip() == "[DONE]":
                yield None
                continue
            try:
                content = json.loads(data) if kind == "data" and colon else None
            except ValueError:
                content = None
            if not isinstance(content, dict):
                raise SideError(f"the stream has what is not an event: {line[:80]!r}")
            if "error" in content:
                raise SideError(f"the stream ended with an error: {_message(content)}")
            yield read_event(content)

    async def counters(self) -> dict[str, float]:
        """The counters of /metrics, each summed over its labels; empty where there is no such page."""
        if self.kind == "openai":
            return {}
        async with self._errors():
            response = await self.http.get(f"{self.url}/metrics")
        if not response.is_success:
            return {}
        totals: dict[str, float] = {}
        try:
            for family in text_string_to_metric_families(response.text):
                for sample in family.samples:
                    totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        except (ValueError, LookupError):
            return {}
        return totals

    async def _post(self, path: str, fields: dict[str, Any]) -> Any:
        async with self._errors():
            return self._json(await self.http.post(self.url + path, json=fields))

    @asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        """What can happen to a request, as one line; ends it when its time is over."""
        try:
            async with asyncio.timeout(self.timeout):
                yield
        except (httpx.TimeoutException, TimeoutError) as error:
            raise SideError(f"{self.url} gave no answer within {self.timeout:g} s") from error
        except httpx.ConnectError as error:
            raise SideError(f"no server answers at {self.url}") from error
        except httpx.HTTPError as error:
            raise SideError(f"{self.url} broke the connection off ({type(error).__name__})") from error
        except (httpx.InvalidURL, UnicodeError) as error:
            raise SideError(f"{self.url} is not a URL: {error}") from error

    def _json(self, response: httpx.Response) -> Any:
        path = response.request.url.path
        try:
            payload = response.json()
        except ValueError as error:
            failed = "" if response.is_success else f"HTTP {response.status_code} and "
            told = f"{path} answered {failed}what is not JSON: {response.text[:80]!r}{self._hint(response)}"
            raise SideError(told) from error
        if not response.is_success:
            kind = RefusedError if response.status_code in (400, 422, 501) else SideError
            raise kind(f"{path} answered HTTP {response.status_code}: {_message(payload)}{self._hint(response)}")
        return payload

    def _hint(self, response: httpx.Response) -> str:
        """What to try where a server of unknown make has no such page."""
        missing = self.kind == "openai" and response.status_code in (404, 405)
        return "; if it serves chats only, try --chat" if missing and response.url.path == "/v1/completions" else ""


def _message(payload: Any) -> str:
    """What an error's body says, in one line."""
    error = payload.get("error", payload) if isinstance(payload, dict) else payload
    # FastAPI calls it detail.
    message = error.get("message", error.get("detail", error)) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:200]


def drafts_between(kind: str, before: dict[str, float], after: dict[str, float]) -> Drafts | None:
    """What speculation did between two readings of the counters; None if nothing was drafted."""

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    if kind == "vllm":
        steps, accepted = (
            grown("vllm:spec_decode_num_drafts_total"),
            grown("vllm:spec_decode_num_accepted_tokens_total"),
        )
    else:
        steps = grown("sglang:spec_verify_calls_total")
        # A request's first token comes from its prefill, and one of every verification is the model's own.
        accepted = grown("sglang:generation_tokens_total") - grown("sglang:num_requests_total") - steps
    return Drafts(steps=int(steps), accepted=max(int(accepted), 0)) if steps > 0 else None
