"""Ties and faults, noise and margins, blame and status: on a recorded comparison, as it is and with one thing changed.

The record is of ``vllm``, ``sglang`` and ``hf`` on the tiny checkpoint in float32, and of ``wrong``, transformers with
one tensor disturbed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qnext_plugins.cli.compare.analysis import compare_all, margin_of, own_differences
from qnext_plugins.cli.compare.report import Answer, Kind, Noise, Pair, Report, Score, Side, Status, Unit
from qnext_plugins.cli.compare.verdict import choose_referee, conclude

RECORDED = Path(__file__).parent / "data" / "compare_report.json"
RIGHT = ("vllm", "sglang", "hf")


@pytest.fixture
def report() -> Report:
    return Report.model_validate_json(RECORDED.read_text())


def judged(report: Report, *names: str, referee: str | None = None, **options: float) -> Report:
    """The report of only these sides, judged anew."""
    report.sides = [side for side in report.sides if side.name in (names or RIGHT)]
    report.referee = choose_referee(report.sides, referee)
    report.pairs = compare_all(report.sides, referee=report.referee, **options)
    conclude(report)
    return report


def side_of(report: Report, name: str) -> Side:
    return next(side for side in report.sides if side.name == name)


def pair_of(report: Report, a: str, b: str) -> Pair:
    return next(pair for pair in report.pairs if (pair.a, pair.b) == (a, b))


def change_token(side: Side, prompt: int, position: int, gap: float | None) -> None:
    """Let ``side`` take another token there, with this gap of its best two."""
    answer = next(answer for answer in side.answers if answer.prompt == prompt)
    assert answer.ids is not None
    assert answer.gaps is not None
    answer.ids[position] += 1
    answer.gaps[position] = gap


def set_gap(side: Side, prompt: int, position: int, gap: float) -> None:
    answer = next(answer for answer in side.answers if answer.prompt == prompt)
    assert answer.gaps is not None
    answer.gaps[position] = gap


def test_right_sides_agree(report: Report) -> None:
    judged(report)
    assert report.status is Status.agreement
    assert report.status.exit_code == 0
    assert report.verdict[0] == "All agree: vllm, sglang, hf."
    for pair in report.pairs:
        assert pair.identical == pair.prompts == len(report.prompts)
        assert pair.deltas is not None
        assert pair.deltas.mean < 1e-4


def test_wrong_weight_is_blamed_on_its_side(report: Report) -> None:
    judged(report, *RIGHT, "wrong")
    assert report.status is Status.disagreement
    assert report.referee == "hf"
    assert report.verdict[0] == (
        "wrong disagrees with the referee hf, vllm and sglang agree with it: the fault is in wrong."
    )
    assert [pair.agrees for pair in report.pairs if not pair.has("wrong")] == [True] * 3
    assert [pair.agrees for pair in report.pairs if pair.has("wrong")] == [False] * 3


def test_two_servers_without_a_referee_are_not_blamed(report: Report) -> None:
    judged(report, "vllm", "wrong", referee=None)
    report.referee = None
    conclude(report)
    assert report.verdict[0] == (
        "These disagree, and without a referee nothing says which is at fault: vllm and wrong."
    )


def test_referee_is_transformers_else_the_third(report: Report) -> None:
    sides = report.sides
    assert choose_referee(sides, None) == "hf"
    assert choose_referee(sides, "vllm") == "vllm"
    vllm, sglang, *_ = sides
    third = vllm.model_copy(update={"name": "third"})
    assert choose_referee([vllm, sglang], None) is None
    assert choose_referee([vllm, sglang, third], None) == "third"
    again = third.model_copy(update={"without_drafts_of": "vllm"})
    assert choose_referee([vllm, sglang, again], None) is None


def test_parting_is_a_tie_only_if_both_gaps_are_within_the_margin(report: Report) -> None:
    for ours, theirs, kind in ((5e-4, 5e-4, Kind.tie), (5e-4, 0.5, Kind.fault), (0.5, 5e-4, Kind.fault)):
        changed = report.model_copy(deep=True)
        set_gap(side_of(changed, "vllm"), 1, 4, ours)
        change_token(side_of(changed, "hf"), 1, 4, theirs)
        pair = pair_of(judged(changed, "vllm", "hf"), "vllm", "hf")
        assert [(parting.prompt, parting.position, parting.kind) for parting in pair.partings] == [(1, 4, kind)]
        assert pair.identical == pair.prompts - 1
        assert pair.agrees is (kind is Kind.tie)


def test_margin_grows_with_the_noise_of_both_sides_and_with_rounding(report: Report) -> None:
    vllm, hf = side_of(report, "vllm"), side_of(report, "hf")
    quiet = Noise(tokens=1, mean=0.0, p99=0.0, largest=0.0)
    for side, p99 in ((vllm, 0.01), (hf, 0.02)):
        side.noise, side.consistent = quiet.model_copy(update={"p99": p99}), True
    assert margin_of(vllm, hf) == pytest.approx(0.06)
    vllm.noise = hf.noise = quiet
    assert margin_of(vllm, hf) == pytest.approx(1e-3)
    vllm.dtype = "bfloat16"
    assert margin_of(vllm, hf) == pytest.approx(0.125)
    assert margin_of(vllm, hf, 0.5) == 0.5


def test_side_that_contradicts_itself_is_named_and_excuses_nothing(report: Report) -> None:
    vllm = side_of(report, "vllm")
    for answer in vllm.answers:
        answer.log_probs = [number - 0.3 for number in answer.log_probs or []]
    assert own_differences(vllm).mean() > 0.2
    set_gap(vllm, 1, 4, 0.1)
    change_token(side_of(report, "hf"), 1, 4, 0.1)
    judged(report, "vllm", "sglang", "hf")
    assert side_of(report, "vllm").consistent is False
    assert pair_of(report, "vllm", "hf").margin == pytest.approx(1e-3)
    assert pair_of(report, "vllm", "hf").partings[0].kind is Kind.fault
    assert any(line.startswith("vllm contradicts itself") for line in report.verdict)


def test_contradiction_alone_is_a_disagreement(report: Report) -> None:
    for answer in side_of(report, "sglang").answers:
        answer.log_probs = [number - 0.3 for number in answer.log_probs or []]
    judged(report)
    assert all(pair.agrees for pair in report.pairs)
    assert report.status is Status.disagreement


def test_single_log_prob_far_off_is_a_disagreement(report: Report) -> None:
    score = side_of(report, "sglang").scores[0]
    score.log_probs[2] -= 0.08
    judged(report, tolerance=1e-3)
    pair = pair_of(report, "vllm", "sglang")
    assert pair.deltas is not None
    assert pair.deltas.worst.position == 2
    assert pair.deltas.worst.b_log_prob == pytest.approx(pair.deltas.worst.a_log_prob - 0.08, abs=1e-3)
    assert not pair.agrees


def test_prompts_of_other_tokens_are_a_disagreement_and_not_compared(report: Report) -> None:
    for answer in side_of(report, "sglang").answers[:2]:
        answer.prompt_ids = [1, *(answer.prompt_ids or [])]
    pair = pair_of(judged(report), "vllm", "sglang")
    assert pair.other_prompts == [0, 1]
    assert pair.identical == pair.prompts - 2
    assert "2 prompts become different tokens (first: 0)" in pair.reasons[0]
    assert pair.agrees is False


def without_ids(side: Side) -> None:
    side.scores = []
    for answer in side.answers:
        answer.ids = answer.prompt_ids = None


def test_side_without_ids_is_compared_by_the_texts_of_its_tokens(report: Report) -> None:
    without_ids(side_of(report, "sglang"))
    pair = pair_of(judged(report), "vllm", "sglang")
    assert pair.unit is Unit.texts
    assert pair.identical == pair.prompts
    assert pair.deltas is None
    assert pair.agrees
    assert report.status is Status.agreement


def test_side_with_only_text_is_compared_by_characters_and_its_partings_stay_unknown(report: Report) -> None:
    sglang = side_of(report, "sglang")
    without_ids(sglang)
    for answer in sglang.answers:
        answer.texts = answer.log_probs = answer.gaps = None
    sglang.answers[2].text = sglang.answers[2].text[:5] + "?"
    pair = pair_of(judged(report), "vllm", "sglang")
    assert pair.unit is Unit.characters
    assert [(parting.position, parting.kind) for parting in pair.partings] == [(5, Kind.unknown)]
    assert (pair.agrees, pair.word) == (None, "undecided")
    assert report.status is Status.incomplete
    assert any(line.startswith("vllm and sglang, undecided: 1 of 5 continuations part") for line in report.verdict)


def test_empty_answers_are_no_agreement(report: Report) -> None:
    sglang = side_of(report, "sglang")
    without_ids(sglang)
    for answer in sglang.answers:
        answer.texts = answer.log_probs = answer.gaps = None
        answer.text = ""
    pair = pair_of(judged(report), "vllm", "sglang")
    assert (pair.agrees, pair.word) == (None, "not compared")
    assert report.status is Status.incomplete


def test_answer_that_ends_earlier_is_compared_as_far_as_it_goes(report: Report) -> None:
    answer = side_of(report, "sglang").answers[0]
    for entries in (answer.ids, answer.texts, answer.log_probs, answer.gaps):
        assert entries is not None
        del entries[6:]
    pair = pair_of(judged(report), "vllm", "sglang")
    assert pair.identical == pair.prompts
    assert pair.tokens == sum(len(answer.ids or []) for answer in side_of(report, "sglang").answers)


def test_whatever_is_missing_makes_an_agreement_incomplete_but_not_a_disagreement_less(report: Report) -> None:
    side_of(report, "sglang").problems.append("prompt 3: HTTP 500")
    incomplete = judged(report.model_copy(deep=True))
    assert incomplete.status is Status.incomplete
    assert incomplete.status.exit_code == 2
    assert "sglang: prompt 3: HTTP 500" in incomplete.verdict[-1]
    assert judged(report, *RIGHT, "wrong").status is Status.disagreement


def test_side_that_answered_nothing_is_not_compared(report: Report) -> None:
    sglang = side_of(report, "sglang")
    sglang.answers, sglang.scores = [], []
    judged(report)
    assert [pair.agrees for pair in report.pairs] == [None, True, None]
    assert report.status is Status.incomplete
    assert any("could not be compared" in line for line in report.verdict)


def test_reported_continuations_are_those_of_their_key() -> None:
    numbers = {"prompt": 1, "prompt_ids": [4, 5], "ids": [6]}
    score = Score(**numbers, author="a", log_probs=[-1.0], gaps=[None])
    assert score.key == Answer(**numbers, text="x").key == (1, (4, 5), (6,))
    assert Answer(prompt=1, text="x").key is None


def test_speed_is_told_as_ratios_of_what_was_measured(report: Report) -> None:
    vllm, sglang = side_of(report, "vllm"), side_of(report, "sglang")
    for side, rate in ((vllm, 50.0), (sglang, 100.0)):
        side.levels = [side.levels[0].model_copy(update={"concurrency": 2, "tokens_per_second": rate})]
    judged(report)
    assert "At concurrency 2, sglang is the fastest with 100 tokens/s: 2.00 times vllm (50)." in report.verdict


def test_drafts_are_told_with_what_they_gain(report: Report) -> None:
    vllm = side_of(report, "vllm")
    assert vllm.drafts is not None
    vllm.drafts.steps, vllm.drafts.accepted = 10, 15
    level = vllm.levels[0].model_copy(update={"concurrency": 1, "tokens_per_second": 60.0})
    vllm.levels = [level]
    plain = vllm.model_copy(deep=True, update={"name": "plain", "without_drafts_of": "vllm", "drafts": None})
    plain.levels = [level.model_copy(update={"tokens_per_second": 40.0})]
    report.sides.append(plain)
    judged(report, "vllm", "plain", "hf")
    assert (
        "vllm accepts 2.50 tokens a step with its drafts; 1.50 times as fast as without at concurrency 1."
        in report.verdict
    )
