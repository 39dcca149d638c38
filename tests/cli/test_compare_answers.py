"""Answers of the real engines, recorded by ``tests.cli.record_answers``, and answers that are not as they should be."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qnext_plugins.cli.compare.answers import (
    SideError,
    read_chat,
    read_completion,
    read_sglang_score,
    read_vllm_score,
)

DATA = Path(__file__).parent / "data"
KINDS = ("vllm", "sglang", "hf")
READ_SCORE = {"vllm": read_vllm_score, "sglang": read_sglang_score, "hf": read_vllm_score}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def recorded(kind: str) -> dict[str, Any]:
    """The answers of one engine: completion, chat, score."""
    return dict(json.loads((DATA / f"answers_{kind}.json").read_text()))


@pytest.mark.parametrize(("what", "read"), [("completion", read_completion), ("chat", read_chat)])
def test_tokens_texts_and_numbers_belong_together(
    recorded: dict[str, Any], what: str, read: Callable[[int, Any], Any]
) -> None:
    answer = read(3, recorded[what])
    assert answer.prompt == 3
    assert answer.finish_reason == "length"
    assert len(answer.ids) == len(answer.texts) == len(answer.log_probs) == len(answer.gaps) == 8
    assert "".join(answer.texts) == answer.text
    assert len(answer.prompt_ids) > 3
    assert all(number <= 0 for number in answer.log_probs)
    assert all(gap is not None and gap >= 0 for gap in answer.gaps)


def test_engines_say_the_same_of_the_same_prompt() -> None:
    answers = [
        read_completion(0, json.loads((DATA / f"answers_{kind}.json").read_text())["completion"]) for kind in KINDS
    ]
    assert answers[0].key == answers[1].key == answers[2].key is not None
    assert answers[0].texts == answers[1].texts == answers[2].texts
    for answer in answers[1:]:
        assert answer.log_probs == pytest.approx(answers[0].log_probs, abs=1e-4)
        assert answer.gaps == pytest.approx(answers[0].gaps, abs=1e-4)


def test_score_gives_the_generated_tokens_their_log_probs_and_gaps(kind: str, recorded: dict[str, Any]) -> None:
    answer = read_completion(0, recorded["completion"])
    log_probs, gaps = READ_SCORE[kind](answer.prompt_ids, answer.ids, recorded["score"])
    assert log_probs == pytest.approx(answer.log_probs, abs=1e-4)
    assert gaps == pytest.approx(answer.gaps, abs=1e-4)


def test_score_of_other_tokens_is_refused(kind: str, recorded: dict[str, Any]) -> None:
    answer = read_completion(0, recorded["completion"])
    ids = answer.ids or []
    for wrong in ([*ids, 5], [*ids[:-1], ids[-1] + 1]):
        with pytest.raises(SideError, match="score"):
            READ_SCORE[kind](answer.prompt_ids or [], wrong, recorded["score"])


@pytest.mark.parametrize("payload", [None, [], {}, {"choices": []}, {"choices": [{"text": 3}]}, {"choices": "no"}])
def test_answer_of_another_shape_is_one_line(payload: Any) -> None:
    for read in (read_completion, read_chat):
        with pytest.raises(SideError, match="completion") as error:
            read(0, payload)
        assert "\n" not in str(error.value)


def test_lists_of_different_lengths_are_refused(recorded: dict[str, Any]) -> None:
    broken = copy.deepcopy(recorded["completion"])
    broken["choices"][0]["token_ids"].append(1)
    with pytest.raises(SideError, match="9 token ids, 8 token texts"):
        read_completion(0, broken)


def test_answer_without_extensions_has_only_its_text(recorded: dict[str, Any]) -> None:
    (choice,) = recorded["completion"]["choices"]
    answer = read_completion(0, {"choices": [{"text": choice["text"], "finish_reason": "stop"}]})
    assert answer.text == choice["text"]
    assert (answer.ids, answer.texts, answer.log_probs, answer.gaps, answer.key) == (None, None, None, None, None)


@pytest.mark.parametrize("log_probs", [{"content": [{"token": "a", "logprob": -1.0}]}, [], "none", {"tokens": [1]}])
def test_log_probs_in_a_shape_of_the_servers_own_are_none(log_probs: Any) -> None:
    answer = read_completion(0, {"choices": [{"text": "a", "logprobs": log_probs}]})
    assert (answer.text, answer.log_probs, answer.texts) == ("a", None, None)
    answer = read_chat(0, {"choices": [{"message": {"content": "a"}, "logprobs": {"tokens": ["a"]}}]})
    assert (answer.text, answer.log_probs, answer.texts) == ("a", None, None)


@pytest.mark.parametrize("number", ["NaN", "-Infinity"])
def test_log_prob_that_is_no_number_is_refused(kind: str, recorded: dict[str, Any], number: str) -> None:
    answer = read_completion(0, recorded["completion"])
    assert answer.log_probs is not None
    assert answer.prompt_ids is not None
    assert answer.ids is not None
    broken = json.dumps(recorded["completion"]).replace(json.dumps(answer.log_probs[2]), number)
    with pytest.raises(SideError, match="the answer has a log-probability of"):
        read_completion(0, json.loads(broken))
    score = json.dumps(recorded["score"])
    for given in READ_SCORE[kind](answer.prompt_ids, answer.ids, recorded["score"])[0]:
        score = score.replace(json.dumps(given), number)
    with pytest.raises(SideError, match="has a log-probability of"):
        READ_SCORE[kind](answer.prompt_ids, answer.ids, json.loads(score))
