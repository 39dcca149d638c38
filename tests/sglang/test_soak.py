"""500 requests, some aborted and some cut off, with drafts and the radix cache: nothing leaks, nothing differs."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from examples.demo_sglang import Server
from tests import reference
from tests.checkpoints import TINY

pytestmark = pytest.mark.sglang

REQUESTS = 500
IN_FLIGHT = 32
FLAGS = ("--dtype", "float32", "--max-running-requests", "12", "--chunked-prefill-size", "128")


@dataclass
class Request:
    rid: str
    """Of one length: SGLang aborts every request whose id begins with the given one."""
    prompt: reference.Tokens
    max_tokens: int
    fate: str
    """"complete", "abort" (the server is asked to) or "disconnect" (the client goes away)."""
    after: int
    """Chunks of the stream before its fate."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        # Whenever it is idle, the scheduler then ends with an error if a slot or a page is missing.
        patch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE", "1")
        with Server(TINY, tmp_path_factory.mktemp("soak") / "log.txt", speculative=True, flags=FLAGS) as server:
            server.wait()
            yield server


def requests() -> list[Request]:
    """Prompts and prompts continued by their answers, so that the cache has something to share."""
    chance = random.Random(0)
    prompts = list(reference.prompts(TINY))[::2]
    prompts += [prompt + reference.greedy(TINY, prompt)[: 20 + n] for n, prompt in enumerate(prompts)]
    fates = ("complete", "complete", "complete", "abort", "disconnect")
    return [
        Request(f"{n:04}", chance.choice(prompts), chance.randint(1, 64), chance.choice(fates), chance.randint(1, 6))
        for n in range(REQUESTS)
    ]


async def send(client: httpx.AsyncClient, request: Request) -> tuple[list[int], bool]:
    """The tokens that arrived, and whether that was all of them."""
    parameters = {"temperature": 0.0, "max_new_tokens": request.max_tokens, "ignore_eos": True}
    body = {"input_ids": list(request.prompt), "sampling_params": parameters, "stream": True, "rid": request.rid}
    tokens: list[int] = []
    chunks = 0
    async with client.stream("POST", "/generate", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            tokens = chunk["output_ids"]
            reason = chunk["meta_info"]["finish_reason"]
            if reason is not None:
                return tokens, reason["type"] == "length"
            chunks += 1
            if chunks == request.after and request.fate == "disconnect":
                return tokens, False
            if chunks == request.after and request.fate == "abort":
                await client.post("/abort_request", json={"rid": request.rid})
    return tokens, False


async def run(url: str, batch: list[Request], in_flight: int) -> list[tuple[list[int], bool]]:
    gate = asyncio.Semaphore(in_flight)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False) as client:

        async def gated(request: Request) -> tuple[list[int], bool]:
            async with gate:
                return await send(client, request)

        return await asyncio.gather(*(gated(request) for request in batch))


def test_every_completed_request_equals_its_solo_run_and_nothing_leaks(server: Server) -> None:
    batch = requests()
    results = asyncio.run(run(server.url, batch, IN_FLIGHT))
    outcome = Counter((request.fate, complete) for request, (_, complete) in zip(batch, results, strict=True))
    print(dict(outcome))
    assert outcome["complete", True] == sum(request.fate == "complete" for request in batch)
    assert outcome["abort", False] > 20
    assert outcome["disconnect", False] > 20

    httpx.post(f"{server.url}/flush_cache", trust_env=False).raise_for_status()
    prompts = sorted({request.prompt for request in batch})
    alone = [Request(f"{REQUESTS + n:04}", prompt, 64, "complete", 0) for n, prompt in enumerate(prompts)]
    solo = {r.prompt: tokens for r, (tokens, _) in zip(alone, asyncio.run(run(server.url, alone, 1)), strict=True)}
    for request, (tokens, complete) in zip(batch, results, strict=True):
        assert len(tokens) == request.max_tokens or not complete
        assert tokens == solo[request.prompt][: len(tokens)], request
    for prompt in reference.prompts(TINY):
        if prompt in solo:
            assert tuple(solo[prompt]) == reference.greedy(TINY, prompt)

    metrics = server.metrics()
    assert 0 < metrics.accepted < metrics.drafted
    assert metrics.cached > 0
    log = "\n".join(server.lines())
    assert server.process.poll() is None, "the scheduler checks its pools whenever it is idle, as between the solo runs"
    assert "leak" not in log
