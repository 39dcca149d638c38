"""bfloat16: rounding is told from a fault, on a recorded comparison, as it is and with one thing changed.

The record is of ``vllm``, ``sglang`` and ``hf`` on the tiny checkpoint in bfloat16; of ``wrong`` and ``slight``,
transformers with one tensor multiplied by 0.9 and 0.97; and of what ``hf`` reads in float32.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qnext_plugins.cli.compare.analysis import compare_all
from qnext_plugins.cli.compare.page import render_page
from qnext_plugins.cli.compare.report import Answer, Kind, Pair, Report, Side, Status
from qnext_plugins.cli.compare.rounding import TIMES, TOLERANCE, UNKNOWN_TOLERANCE, dtypes_to_read
from qnext_plugins.cli.compare.verdict import choose_referee, conclude

RECORDED = Path(__file__).parent / "data" / "compare_bfloat16.json"
RIGHT = ("vllm", "sglang", "hf")
WIDEST = 0.94
"""The widest gap with which right sides part in the record."""


@pytest.fixture
def report() -> Report:
    return Report.model_validate_json(RECORDED.read_text())


def judged(report: Report, *names: str, **options: float) -> Report:
    """The report of only these sides, judged anew."""
    report.sides = [side for side in report.sides if side.name in (names or RIGHT)]
    report.referee = choose_referee(report.sides, None)
    report.pairs = compare_all(report.sides, referee=report.referee, **options)
    conclude(report)
    return report


def side_of(report: Report, name: str) -> Side:
    return next(side for side in report.sides if side.name == name)


def pair_of(report: Report, a: str, b: str) -> Pair:
    return next(pair for pair in report.pairs if (pair.a, pair.b) == (a, b))


def parted(report: Report) -> tuple[Answer, int]:
    """vLLM's answer that parts from transformers with the widest gap, and where."""
    pair = pair_of(judged(report.model_copy(deep=True)), "vllm", "hf")
    parting = max(pair.partings, key=lambda each: each.a_gap or 0.0)
    answers = side_of(report, "vllm").answers
    return next(answer for answer in answers if answer.prompt == parting.prompt), parting.position


def test_right_sides_agree_though_they_part_with_wide_gaps(report: Report) -> None:
    judged(report)
    assert (report.status, report.verdict[0]) == (Status.agreement, "All agree within rounding: vllm, sglang, hf.")
    pair = pair_of(report, "vllm", "hf")
    assert pair.partings_of(Kind.fault) == []
    widest = max(parting.a_gap or 0.0 for parting in pair.partings_of(Kind.rounding))
    assert widest == pytest.approx(WIDEST, abs=0.01)
    assert pair.margin < widest < (pair.rounding or 0.0)
    for name in ("vllm", "sglang"):
        ratios = [error.ratio or 0.0 for error in side_of(report, name).errors]
        assert len(ratios) == 2
        assert all(0.4 < ratio < 1.1 for ratio in ratios)
        assert any(line.startswith(f"{name}'s error against float32 is 0.7 times") for line in report.verdict)


def test_transformers_is_its_own_measure(report: Report) -> None:
    error = side_of(judged(report), "hf").error_reading
    assert error is not None
    assert (error.mean, error.ratio, error.allowed) == (error.usual, 1.0, TIMES * error.usual)


@pytest.mark.parametrize("kept", [range(0, 10, 2), range(1, 10, 2), range(5), range(5, 10)])
def test_right_sides_agree_and_the_wrong_one_is_found_on_half_of_the_prompts(report: Report, kept: range) -> None:
    for side in report.sides:
        side.answers = [answer for answer in side.answers if answer.prompt in kept]
        for scores in (side.scores, *side.readings.values()):
            scores[:] = [score for score in scores if score.prompt in kept]
    assert judged(report.model_copy(deep=True)).status is Status.agreement
    assert judged(report, *RIGHT, "wrong").verdict[0].endswith("the fault is in wrong.")


def test_wrong_weight_is_found_in_bfloat16(report: Report) -> None:
    judged(report, *RIGHT, "wrong")
    assert report.status is Status.disagreement
    assert report.verdict[0] == (
        "wrong disagrees with the referee hf, vllm and sglang agree with it: the fault is in wrong."
    )
    errors = side_of(report, "wrong").errors
    assert all((error.ratio or 0.0) > TIMES for error in errors)
    wrong = pair_of(report, "hf", "wrong")
    assert wrong.partings_of(Kind.rounding) == []
    assert wrong.partings_of(Kind.fault)
    told = [line for line in report.verdict if line.startswith("wrong's error")]
    assert len(told) == 2
    assert all("times transformers' own in bfloat16: a fault (mean |Δ log p|" in line for line in told)


def test_fault_smaller_than_rounding_is_told_with_its_size_and_passes(report: Report) -> None:
    judged(report, *RIGHT, "slight")
    assert report.status is Status.agreement
    assert any(line.startswith("slight's error against float32 is 1.6 times") for line in report.verdict)


def test_fault_in_generating_alone_is_found(report: Report) -> None:
    for answer in side_of(report, "vllm").answers:
        answer.log_probs = [number - 0.1 for number in answer.log_probs or []]
    judged(report)
    vllm = side_of(report, "vllm")
    assert vllm.error_reading is not None
    assert vllm.error_generating is not None
    assert (vllm.error_reading.is_rounding, vllm.error_generating.is_rounding) == (True, False)
    assert report.status is Status.disagreement
    assert report.verdict[0].startswith("vllm disagrees with the referee hf, sglang agrees with it")


def test_parting_that_rounding_cannot_explain_is_a_fault(report: Report) -> None:
    answer, position = parted(report)
    limit = pair_of(judged(report.model_copy(deep=True)), "vllm", "hf").rounding
    assert limit is not None
    for gap, kind in ((0.99 * limit, Kind.rounding), (1.01 * limit, Kind.fault)):
        assert answer.gaps is not None
        answer.gaps[position] = gap
        changed = judged(report.model_copy(deep=True))
        pair = pair_of(changed, "vllm", "hf")
        assert kind in [parting.kind for parting in pair.partings]
        assert pair.agrees is (kind is Kind.rounding)


def test_nothing_is_called_rounding_or_fault_where_nothing_measured_it(report: Report) -> None:
    side_of(report, "hf").readings = {}
    judged(report)
    pair = pair_of(report, "vllm", "hf")
    assert (pair.rounding, pair.tolerance, pair.word) == (None, UNKNOWN_TOLERANCE, "undecided")
    assert {parting.kind for parting in pair.partings} == {Kind.tie, Kind.unknown}
    assert report.status is Status.incomplete
    assert any(line.startswith("Nothing measured how much rounding there is") for line in report.verdict)


def test_mean_beyond_the_rule_of_thumb_is_a_disagreement_without_a_measure(report: Report) -> None:
    for score in side_of(report, "wrong").scores:
        score.log_probs = [number - 0.2 for number in score.log_probs]
    judged(report, "vllm", "wrong")
    assert report.status is Status.disagreement


def test_users_word_decides_over_what_was_measured(report: Report) -> None:
    assert judged(report.model_copy(deep=True), *RIGHT, "wrong", tolerance=1.0).status is Status.agreement
    strict = judged(report.model_copy(deep=True), tie_gap=0.0)
    assert pair_of(strict, "vllm", "hf").partings_of(Kind.fault) == pair_of(strict, "vllm", "hf").partings
    assert judged(report, tolerance=1e-5).status is Status.disagreement


def test_side_in_float32_stays_held_to_float32(report: Report) -> None:
    vllm, exact = side_of(report, "vllm"), side_of(report, "hf").readings["float32"]
    vllm.dtype = "float32"
    for shift, right in ((0.5 * TOLERANCE["float32"], True), (2 * TOLERANCE["float32"], False)):
        vllm.scores = [score.model_copy(deep=True) for score in exact]
        for score in vllm.scores:
            score.log_probs = [number - shift for number in score.log_probs]
        error = side_of(judged(report.model_copy(deep=True)), "vllm").error_reading
        assert error is not None
        assert (error.usual, error.ratio, error.is_rounding) == (0.0, None, right)


def test_where_rounding_moves_nothing_float32s_tolerance_is_allowed(report: Report) -> None:
    hf = side_of(report, "hf")
    hf.readings["float32"] = [score.model_copy(deep=True) for score in hf.scores]
    error = side_of(judged(report), "hf").error_reading
    assert error is not None
    assert (error.usual, error.allowed) == (0.0, TOLERANCE["float32"])


def test_referee_reads_in_float32_and_in_the_dtypes_of_the_sides(report: Report) -> None:
    sides = judged(report).sides
    hf, vllm = side_of(report, "hf"), side_of(report, "vllm")
    assert dtypes_to_read(sides, hf) == ["float32"]
    hf.dtype = "float32"
    assert dtypes_to_read(sides, hf) == ["bfloat16"]
    vllm.dtype = "float16"
    assert dtypes_to_read(sides, hf) == ["bfloat16", "float16"]
    assert dtypes_to_read(sides, vllm) == []
    for side in sides:
        side.dtype = "float32"
    assert dtypes_to_read(sides, hf) == []
    vllm.dtype = None
    assert dtypes_to_read(sides, hf) == ["bfloat16"]
    for answer in vllm.answers:
        answer.log_probs = None
    assert dtypes_to_read(sides, hf) == []


def test_page_shows_errors_and_kinds_of_partings(report: Report) -> None:
    html = render_page(judged(report, *RIGHT, "wrong"))
    assert "error, reading" in html
    assert "(0.7×)" in html
    assert 'class="n bad">0.093 (2.8×)' in html
    assert '<mark class="rounding">' in html
    assert "wrong – float32" in html
