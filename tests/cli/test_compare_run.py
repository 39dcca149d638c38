"""``qnext compare`` with transformers on all sides: agreement, a wrong weight, misbehaving servers, an interrupt."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import typer
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qnext_plugins.cli.compare import referee, servers
from qnext_plugins.cli.compare.answers import SideError
from qnext_plugins.cli.compare.command import compare
from qnext_plugins.cli.compare.report import Kind, Report, Side, Status, Unit
from qnext_plugins.cli.compare.servers import Server
from qnext_plugins.cli.compare.sides import parse_side
from tests.checkpoints import TINY
from tests.cli.compare_checkpoints import DISTURBED, write_disturbed_checkpoint
from tests.cli.compare_servers import Handler, misbehaving, plain

app = typer.Typer()
app.command()(compare)

SMALL = ("--limit", "6", "--max-tokens", "12", "--concurrency", "2")
FLAGS = "--dtype float32 --threads 1"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of transformers with the tiny checkpoint."""
    server = Server(parse_side(f"hf:{TINY} {FLAGS}"), sys.executable, tmp_path_factory.mktemp("good") / "log.txt")
    try:
        asyncio.run(server.ready(120))
        yield server.url
    finally:
        server.stop()


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of transformers with a wrong weight."""
    folder = tmp_path_factory.mktemp("disturbed")
    checkpoint = write_disturbed_checkpoint(folder / "checkpoint")
    server = Server(parse_side(f"hf:{checkpoint} {FLAGS}"), sys.executable, folder / "log.txt")
    try:
        asyncio.run(server.ready(120))
        yield server.url
    finally:
        server.stop()


def run(tmp_path: Path, *arguments: str) -> tuple[Result, Report]:
    """What the command printed, and its report."""
    file = tmp_path / "report.json"
    fixed = ("--json", str(file), "--output", str(tmp_path / "logs"), *SMALL)
    result = CliRunner().invoke(app, [*arguments, *fixed])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result, Report.model_validate_json(file.read_text())


def side_of(report: Report, name: str) -> Side:
    return next(side for side in report.sides if side.name == name)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"


def test_a_folder_of_logs_that_cannot_be_had_is_named_by_its_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SideError, match=r"^--output: expected a folder that can be written to, got \S+/file \("):
        Server(parse_side("hf:m"), sys.executable, tmp_path / "file" / "log.txt")


def test_side_that_is_started_agrees_with_the_same_model_elsewhere(tmp_path: Path, good: str) -> None:
    result, report = run(tmp_path, f"mine=hf:{TINY} {FLAGS}", f"other={good}", "--html", str(tmp_path / "page.html"))
    assert result.exit_code == 0, result.output
    assert report.status is Status.agreement
    (pair,) = report.pairs
    assert (pair.identical, pair.tokens, pair.unit) == (6, 72, Unit.ids)
    assert pair.deltas is not None
    assert pair.deltas.largest < 1e-4
    mine = side_of(report, "mine")
    assert mine.dtype == "float32"
    assert "transformers" in mine.versions
    assert mine.noise is not None
    assert 0 < mine.noise.mean < 1e-4
    assert (tmp_path / "logs" / "mine.log").exists()
    assert "All agree: mine, other" in " ".join(result.output.split())
    assert "All agree: mine, other" in (tmp_path / "page.html").read_text()


def test_wrong_weight_is_found_and_the_referee_says_whose(tmp_path: Path, good: str, disturbed: str) -> None:
    result, report = run(tmp_path, f"bad={disturbed}", f"fine={good}", f"truth={good}", "--referee", "truth")
    assert result.exit_code == 1, result.output
    assert report.verdict[0] == ("bad disagrees with the referee truth, fine agrees with it: the fault is in bad.")
    against = {(pair.a, pair.b): pair for pair in report.pairs}
    assert against["fine", "truth"].agrees
    wrong = against["bad", "truth"]
    assert not wrong.agrees
    assert wrong.deltas is not None
    assert wrong.deltas.mean > 100 * wrong.tolerance
    assert wrong.partings[0].kind is Kind.fault
    assert max(gap for gap in (wrong.partings[0].a_gap, wrong.partings[0].b_gap) if gap is not None) > wrong.margin
    assert all(side.consistent for side in report.sides), "each is what it says: it is the weights that differ"


def test_two_that_disagree_without_a_referee_are_not_blamed(tmp_path: Path, good: str, disturbed: str) -> None:
    result, report = run(tmp_path, f"a={good}", f"b={disturbed}", "--referee", "a")
    assert result.exit_code == 1
    assert "nobody agrees with it" in report.verdict[0]


def test_wrong_weight_is_no_fault_if_the_user_allows_as_much(tmp_path: Path, good: str, disturbed: str) -> None:
    result, report = run(tmp_path, f"a={good}", f"b={disturbed}", "--tie-gap", "100", "--tolerance", "100")
    assert result.exit_code == 0, result.output
    assert {parting.kind for parting in report.pairs[0].partings} == {Kind.tie}


def test_referee_measures_rounding_in_the_dtype_of_a_side(tmp_path: Path, good: str) -> None:
    coarse = f"coarse=hf:{TINY} --dtype bfloat16 --threads 1"
    result, report = run(tmp_path, coarse, f"truth={good}", "--referee", "truth", "--no-speed")
    assert result.exit_code == 0, result.output
    truth = side_of(report, "truth")
    assert list(truth.readings) == ["bfloat16"]
    assert len(truth.readings["bfloat16"]) == len(truth.scores)
    reading, generating = side_of(report, "coarse").errors
    # It is the same program: what it reads is what the referee reads in bfloat16.
    assert reading.ratio == pytest.approx(1.0, abs=0.01)
    assert generating.ratio is not None
    assert 0.5 < generating.ratio < 2
    assert "All agree within rounding: coarse, truth." in result.output
    assert report.pairs[0].rounding is not None


def test_referee_without_room_for_another_dtype_says_so_and_reads_on(monkeypatch: pytest.MonkeyPatch) -> None:
    own = referee.Referee(str(TINY), "bfloat16", "cpu")
    monkeypatch.setattr(referee, "free_memory", lambda device: 1e6)
    request = {"prompt": [1, 2, 3], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
    with pytest.raises(referee.RequestError, match=r"the model in float32 takes 0\.\d+ GB, and 0\.001 GB are free"):
        own.complete(request | {"prompt_logprobs_dtype": "float32"}, chat=False)
    for dtype in (None, "bfloat16"):
        answer = own.complete(request | {"prompt_logprobs_dtype": dtype}, chat=False)
        assert len(answer["choices"][0]["prompt_logprobs"]) == 3


def test_chat_is_compared_token_by_token(tmp_path: Path, good: str) -> None:
    result, report = run(tmp_path, f"a={good}", f"b={good}", "--chat")
    assert result.exit_code == 0, result.output
    assert report.pairs[0].identical == 6
    assert all(answer.prompt_ids for answer in report.sides[0].answers)
    assert report.sides[0].noise is not None


def dies(handler: Handler, number: int) -> bool:
    """From the third request on it sends half an answer and closes the connection."""
    if number < 2:
        return False
    handler.send(200, b'{"choices": [', length=1000)
    handler.close_connection = True
    return True


def rubbish(handler: Handler, number: int) -> bool:
    handler.send(200, b"<html>It works!</html>")
    return True


def half_json(handler: Handler, number: int) -> bool:
    handler.send(200, json.dumps({"choices": [{"message": "?"}]}).encode())
    return True


def sometimes_500(handler: Handler, number: int) -> bool:
    if number != 2:
        return False
    handler.send(500, json.dumps({"error": {"message": "out of\nluck"}}).encode())
    return True


def slow(handler: Handler, number: int) -> bool:
    time.sleep(3)
    return False


@pytest.mark.parametrize(
    ("misbehave", "line", "answered"),
    [
        (dies, "broke the connection off", 2),
        (rubbish, "not JSON: '<html>It works!</html>'", 0),
        (half_json, "not as expected at choices.0.text: Field required", 0),
        (sometimes_500, "HTTP 500: out of luck", 5),
    ],
)
def test_server_that_misbehaves_is_a_line_and_the_rest_goes_on(
    tmp_path: Path, good: str, misbehave: Callable[[Handler, int], bool], line: str, answered: int
) -> None:
    with misbehaving(good, misbehave) as url:
        result, report = run(tmp_path, f"fine={good}", f"odd={url}")
    assert result.exit_code == 2
    odd, fine = side_of(report, "odd"), side_of(report, "fine")
    assert any(line in problem for problem in odd.problems), odd.problems
    assert all("\n" not in problem for problem in odd.problems)
    assert len(odd.answers) == answered
    assert len(fine.answers) == 6
    assert fine.problems == []
    assert report.pairs[0].prompts == answered
    assert report.pairs[0].identical == answered
    assert "Not everything could be done" in result.output


def test_server_that_is_too_slow_is_given_up_after_its_time(tmp_path: Path, good: str) -> None:
    with misbehaving(good, slow) as url:
        result, report = run(tmp_path, f"fine={good}", f"odd={url}", "--timeout", "1.5")
    assert result.exit_code == 2
    assert any("no answer within 1.5 s" in problem for problem in side_of(report, "odd").problems)


def test_wrong_model_name_is_said_by_the_server(tmp_path: Path, good: str) -> None:
    def unknown(handler: Handler, number: int) -> bool:
        handler.send(404, json.dumps({"error": {"message": "The model `nonsense` does not exist."}}).encode())
        return True

    with misbehaving(good, unknown) as url:
        result, report = run(tmp_path, f"a={url}", f"b={url}", "--model", "nonsense")
    assert result.exit_code == 2
    assert all("The model `nonsense` does not exist." in side.problems[0] for side in report.sides)
    assert [side.model for side in report.sides] == ["nonsense", "nonsense"]


def test_what_cannot_be_started_or_reached_is_said_and_the_rest_goes_on(tmp_path: Path, good: str) -> None:
    wrong = tmp_path / "no-python"
    empty = tmp_path / "empty"
    shutil.copytree(TINY, empty, ignore=shutil.ignore_patterns("*.safetensors"))
    sides = (f"fine={good}", "nowhere=http://127.0.0.1:9", f"hf:{empty}", "vllm:m")
    result, report = run(tmp_path, *sides, "--python-vllm", str(wrong))
    assert result.exit_code == 2
    (nowhere,) = side_of(report, "nowhere").problems
    assert nowhere == "no server answers at http://127.0.0.1:9"
    (missing,) = side_of(report, "hf").problems
    assert "ended with status 1: OSError: Error no file named model.safetensors" in missing
    assert str(empty) in missing
    (python,) = side_of(report, "vllm").problems
    assert f"{wrong} is not a Python that runs" in python
    assert "--python-vllm" in python
    assert len(side_of(report, "fine").answers) == 6


def test_server_of_unknown_make_is_compared_by_its_text_and_timed_by_its_pieces(tmp_path: Path, good: str) -> None:
    with plain(good) as url:
        result, report = run(tmp_path, f"odd={url}/v1", f"fine={good}", "--requests", "2")
    assert result.exit_code == 0, result.output
    odd = side_of(report, "odd")
    assert (odd.kind, odd.model, odd.problems) == ("openai", "some-model", [])
    assert odd.notes == [
        "gives no token ids: it is compared by characters, and what it said is scored by nobody",
        "gives no log-probabilities: where it parts nobody can say whether that is a tie",
        "offers no way to score given tokens",
    ]
    (pair,) = report.pairs
    assert (pair.unit, pair.identical, pair.deltas) == (Unit.characters, 6, None)
    (level,) = odd.levels
    assert (level.requests, level.counted_by, odd.drafts) == (2, "chunks", None)


def test_text_that_parts_and_has_no_numbers_is_undecided(tmp_path: Path, good: str, disturbed: str) -> None:
    with plain(disturbed) as url:
        result, report = run(tmp_path, f"odd={url}", f"fine={good}", "--no-speed")
    assert result.exit_code == 2
    assert report.pairs[0].word == "undecided"
    assert {parting.kind for parting in report.pairs[0].partings} == {Kind.unknown}
    assert "nothing says whether that is a fault" in result.output


def test_server_of_chats_only_is_asked_in_chats(tmp_path: Path, good: str) -> None:
    with plain(good, chats_only=True) as url:
        result, report = run(tmp_path, f"odd={url}", f"fine={good}", "--no-speed")
        assert result.exit_code == 2
        assert "HTTP 404: Not Found; if it serves chats only, try --chat" in side_of(report, "odd").problems[0]
        result, report = run(tmp_path, f"odd={url}", f"fine={good}", "--no-speed", "--chat")
    assert result.exit_code == 0, result.output
    assert report.pairs[0].identical == 6


def test_server_that_lists_no_model_is_asked_for_the_given_one(tmp_path: Path, good: str) -> None:
    with plain(good, lists_models=False) as url:
        _, report = run(tmp_path, f"odd={url}", f"fine={good}", "--no-speed")
        (problem,) = side_of(report, "odd").problems
        assert problem.startswith(f"{url}/v1/models names no model (/v1/models answered HTTP 404")
        assert problem.endswith("give --model")
        result, report = run(tmp_path, f"odd={url}", f"fine={good}", "--no-speed", "--model", "mine")
    assert result.exit_code == 0, result.output
    assert side_of(report, "odd").model == "mine"


def test_engine_that_takes_too_long_to_start_is_given_up(tmp_path: Path, good: str) -> None:
    result, report = run(tmp_path, f"fine={good}", f"hf:{TINY} {FLAGS}", "--start-timeout", "1", "--no-speed")
    assert result.exit_code == 2
    (problem,) = side_of(report, "hf").problems
    assert "the server is not ready after 1 s" in problem
    assert str(tmp_path / "logs" / "hf.log") in problem


def test_python_that_hangs_is_given_up_and_ended(tmp_path: Path, good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    python, pid = tmp_path / "python", tmp_path / "pid"
    python.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 600\n")
    python.chmod(0o755)
    monkeypatch.setattr(servers, "PATIENCE", 0.5)
    _, report = run(tmp_path, f"fine={good}", f"hf:{TINY}", "--python-hf", str(python), "--no-speed")
    (problem,) = side_of(report, "hf").problems
    assert problem.startswith(f"{python} says nothing of its environment within 0.5 s")
    assert is_gone(int(pid.read_text()))


def test_server_that_is_killed_is_said_to_be(tmp_path: Path) -> None:
    server = Server(parse_side(f"hf:{TINY} {FLAGS}"), sys.executable, tmp_path / "log.txt")
    server.process.kill()
    server.process.wait()
    assert server.ended() == (
        f"the server ended by signal 9 (as when memory runs out): it printed nothing (log: {tmp_path / 'log.txt'})"
    )
    server.stop()


def test_one_engine_at_a_time_finds_the_same(tmp_path: Path, good: str) -> None:
    result, report = run(tmp_path, f"mine=hf:{TINY} {FLAGS}", f"other={good}", "--one-at-a-time")
    assert result.exit_code == 0, result.output
    assert report.pairs[0].identical == 6
    assert report.pairs[0].deltas is not None


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_ends_the_server_that_was_started(tmp_path: Path, sent: signal.Signals, status: int) -> None:
    code = "import typer; from qnext_plugins.cli.compare.command import compare; typer.run(compare)"
    file, output = tmp_path / "report.json", tmp_path / "logs"
    sides = [f"hf:{TINY} {FLAGS}", f"hf:{TINY} {FLAGS}"]
    command = [sys.executable, "-c", code, *sides, "--max-tokens", "200", "--output", str(output), "--json", str(file)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Tests that a script runs in the background ignore it, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        pids = wait_for_answers(output, process)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert all(is_gone(pid) for pid in pids)
    if sent is signal.SIGINT:
        report = Report.model_validate_json(file.read_text())
        assert report.interrupted
        assert report.status is Status.incomplete


def wait_for_answers(output: Path, process: subprocess.Popen[str]) -> list[int]:
    """The servers' process ids, once the first has answered something."""
    limit = time.monotonic() + 120
    while "POST /v1/completions" not in (log.read_text() if (log := output / "hf.log").exists() else ""):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    return [int(pid) for pid in children]


def test_checkpoint_that_lacks_a_tensor_cannot_referee(tmp_path: Path, good: str) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(TINY, checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[DISTURBED]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    _, report = run(tmp_path, f"fine={good}", f"hf:{checkpoint} {FLAGS}", "--no-speed")
    (problem,) = side_of(report, "hf").problems
    assert f"the checkpoint lacks 1 of the model's tensors, the first is {DISTURBED}" in problem


def test_referee_says_what_it_does_not_serve(good: str) -> None:
    def ask(path: str, **request: object) -> httpx.Response:
        return httpx.post(good + path, json=request, timeout=60, trust_env=False)

    for request in ({"prompt": "a", "temperature": 1.0}, {"prompt": "a", "stream": True}, {"prompt": []}, {}):
        answer = ask("/v1/completions", **request)
        assert answer.status_code == 400, request
        assert answer.json()["error"]["message"]
    answer = ask("/v1/completions", prompt=[1, 2], temperature=0, prompt_logprobs=1, prompt_logprobs_dtype="int8")
    assert answer.status_code == 400
    assert "prompt_logprobs_dtype" in answer.json()["error"]["message"]
    assert ask("/v1/embeddings").status_code == 404
    assert ask("/v1/completions", prompt="a", temperature=0, max_tokens=2).status_code == 200
