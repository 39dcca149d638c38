"""Times of streams that are known, and streams that are not what they should be."""

from __future__ import annotations

import asyncio

import pytest

from qnext_plugins.cli.compare.answers import SideError
from qnext_plugins.cli.compare.client import Client, Timing, drafts_between
from qnext_plugins.cli.compare.performance import measure, summarise
from qnext_plugins.cli.compare.report import Level, Prompt
from tests.cli.compare_servers import event, streaming

PROMPT = Prompt(prompt="p")
WORDS = [event(" a"), event(" b"), event(" c"), event(" d"), event("", finish="length")]
DONE = "data: [DONE]"
FIRST, BETWEEN = 0.3, 0.1


def stream(url: str, timeout: float = 10) -> Timing:
    async def ask() -> Timing:
        client = Client(url, timeout=timeout)
        try:
            await client.about()
            return await client.stream(PROMPT, 4)
        finally:
            await client.close()

    return asyncio.run(ask())


def level(url: str, **options: int) -> tuple[Level | None, list[str]]:
    async def ask() -> tuple[Level | None, list[str]]:
        client = Client(url, timeout=10)
        try:
            await client.about()
            return await measure(client, [PROMPT], max_tokens=4, done=lambda: None, **options)
        finally:
            await client.close()

    return asyncio.run(ask())


def test_times_of_a_stream_are_those_it_was_sent_with() -> None:
    with streaming([": a comment", *WORDS, event(tokens=8), DONE], first=FIRST, between=BETWEEN) as url:
        timing = stream(url)
    # The comment takes the first wait, the first word the second.
    assert timing.first == pytest.approx(FIRST + BETWEEN, abs=0.08)
    assert timing.last - timing.first == pytest.approx(3 * BETWEEN, abs=0.08)
    assert (timing.tokens, timing.counted) == (8, True)


def test_pieces_are_counted_where_the_server_does_not_count() -> None:
    with streaming([*WORDS, DONE]) as url:
        timing = stream(url)
    assert (timing.tokens, timing.counted) == (4, False)


def test_mark_of_the_end_ends_a_stream_without_a_reason_to_finish() -> None:
    with streaming([*WORDS[:-1], DONE]) as url:
        timing = stream(url)
    assert (timing.tokens, timing.counted) == (4, False)


def test_requests_at_a_time_share_the_seconds() -> None:
    with streaming([*WORDS, DONE], first=FIRST) as url:
        one, _ = level(url, concurrency=1, requests=4)
        four, _ = level(url, concurrency=4, requests=4)
    assert one is not None
    assert four is not None
    assert (one.tokens, four.tokens, one.counted_by) == (16, 16, "chunks")
    assert four.tokens_per_second > 2.5 * one.tokens_per_second
    assert one.tokens_per_second < 4 / FIRST


def test_percentiles_and_rates_of_known_times() -> None:
    timings = [Timing(first=n / 10, last=n / 10 + 1, end=2, tokens=11, counted=True) for n in range(1, 12)]
    found = summarise(timings, 2, 0, seconds=10)
    assert found.tokens_per_second == pytest.approx(12.1)
    assert (found.first_token.p50, found.first_token.p95) == pytest.approx((0.6, 1.05))
    assert found.inter_token is not None
    assert found.inter_token.p50 == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("pieces", "line"),
    [
        ([WORDS[0], "<html>what</html>"], "not an event"),
        ([WORDS[0], "data: {broken"], "not an event"),
        ([WORDS[0], "data: [1, 2]"], "not an event"),
        ([WORDS[0], WORDS[1]], "ended before its last piece"),
        ([WORDS[-1], DONE], "had no text"),
        ([WORDS[0], 'data: {"error": {"message": "out of\\nmemory"}}'], "out of memory"),
        (['data: {"choices": ["text"]}'], "not as expected at choices.0"),
        (['data: {"choices": {"text": "a"}}'], "not as expected at choices"),
        (['data: {"choices": [{"delta": "text"}]}'], "not as expected at choices.0.delta"),
        (['data: {"choices": [{"text": 3}]}'], "not as expected at choices.0.text"),
        (['data: {"usage": "many"}'], "not as expected at usage"),
    ],
)
def test_stream_that_is_none_is_one_line(pieces: list[str], line: str) -> None:
    with streaming(pieces) as url, pytest.raises(SideError, match=line) as error:
        stream(url)
    assert "\n" not in str(error.value)


def test_stream_that_takes_too_long_is_given_up() -> None:
    with streaming(WORDS, first=0.1, between=0.5) as url, pytest.raises(SideError, match=r"no answer within 0\.6 s"):
        stream(url, timeout=0.6)


def test_failures_stop_a_level_after_three_in_a_row() -> None:
    with streaming(["rubbish"]) as url:
        found, failures = level(url, concurrency=1, requests=10)
    assert found is None
    assert len(failures) == 3


def test_accepted_length_is_counted_from_each_engines_metrics() -> None:
    vllm = {"vllm:spec_decode_num_drafts_total": 110.0, "vllm:spec_decode_num_accepted_tokens_total": 230.0}
    before = {"vllm:spec_decode_num_drafts_total": 10.0, "vllm:spec_decode_num_accepted_tokens_total": 30.0}
    drafts = drafts_between("vllm", before, vllm)
    assert drafts is not None
    assert drafts.accepted_length == pytest.approx(3.0)
    # 4 requests of 26 tokens: the first of each is the prefill's, the others came in 40 verifications.
    sglang = {
        "sglang:spec_verify_calls_total": 40.0,
        "sglang:generation_tokens_total": 104.0,
        "sglang:num_requests_total": 4.0,
    }
    drafts = drafts_between("sglang", {}, sglang)
    assert drafts is not None
    assert drafts.accepted_length == pytest.approx(2.5)
    assert drafts_between("vllm", {}, {}) is None
