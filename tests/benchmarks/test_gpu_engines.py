"""``gpu_engines.py`` without a GPU: on engines that run nothing, and on the real ones on a CPU."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from qnext_plugins.cli.bench.models import Slice, SliceWork
from qnext_plugins.cli.bench.output import Files
from qnext_plugins.cli.bench.roofs import Roofs
from qnext_plugins.cli.bench.stepped import EngineError
from qnext_plugins.cli.progress import Progress
from qnext_plugins.model import Qwen3NextConfig, expected_shapes
from tests import reference
from tests.checkpoints import TINY
from tests.reference import Tokens

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SERVED = (
    "qnext-plugins 0.1.0 serves Qwen3NextForCausalLM in torch.bfloat16: moe=triton, gated_delta_rule=gluon, x=triton"
)
FIXED, TOKEN, STEP = 0.004, 1e-5, 0.002
"""Seconds of a request, of a token of a prompt, of a step."""
ANSWER = 6
"""Tokens of an answer in the exact part here."""


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("gpu_engines")


@pytest.fixture(autouse=True)
def short(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short answers, and roofs that are known: 1 TB/s and 100 TFLOP/s."""
    monkeypatch.setattr(sys.modules["gpu_engines_exact"], "TOKENS", ANSWER)

    def measure(roofs: Roofs, thread_counts: list[int], quick: bool) -> None:
        for threads in thread_counts:
            roofs.bandwidth[threads], roofs.bf16[threads], roofs.float32[threads] = 1e12, 1e14, 1e13

    monkeypatch.setattr(Roofs, "measure", measure)


class Pretended:
    """An engine that runs nothing: answers are transformers' or made up, times are a sum of what is known."""

    def __init__(self, name: str, slowness: float, spoil: Callable[[Tokens], Tokens], noise: float) -> None:
        self.name, self.slowness, self.spoil, self.noise = name, slowness, spoil, noise
        self.stopped, self.remembered, self.cached = False, set[Tokens](), 0

    def answers(self, prompts: Sequence[Tokens], max_tokens: int, read: bool = False) -> list[Any]:
        answer = sys.modules["gpu_engines_serving"].Answer
        self.cached += sum(len(prompt) for prompt in prompts if prompt in self.remembered)
        self.remembered |= set(prompts)
        if read:
            scores = [tuple(-1.0 * (token % 7) + self.noise * (-1) ** n for n, token in enumerate(p)) for p in prompts]
            return [answer((1,), (-2.0,), each[1:]) for each in scores]
        given = []
        for prompt in prompts:
            tokens = self.spoil(reference.greedy(TINY, prompt, max_tokens))
            given.append(answer(tokens, tuple(reference.log_probs(TINY, prompt, tokens).tolist())))
        return given

    def seconds(self, prompts: Sequence[Tokens], max_tokens: int) -> float:
        assert not self.remembered & set(prompts), "it would come from the prefix cache"
        return self.slowness * (FIXED + TOKEN * sum(map(len, prompts)) + STEP * (max_tokens - 1))

    def forget(self) -> None:
        self.remembered.clear()

    def counters(self) -> Any:
        return sys.modules["gpu_engines_serving"].Counters(self.cached, 10 * len(self.remembered), 15)

    def served_by(self) -> str | None:
        return SERVED

    def stop(self) -> None:
        self.stopped = True


def unchanged(tokens: Tokens) -> Tokens:
    return tokens


def run(
    script: ModuleType,
    tmp_path: Path,
    *flags: str,
    spoil: Callable[[Tokens], Tokens] = unchanged,
    noise: float = 0.0,
    own: bool = True,
) -> Any:
    """The report of a run on pretended engines; the own model is half as fast again."""
    fixed = ("--engine", "vllm", "--device", "cpu", "--tiny", "--logs", str(tmp_path))
    options = script.options_of(script.parse([*fixed, *flags]))
    started: list[Pretended] = []

    def start(kind: str, name: str, serving: Any, log: Path) -> Pretended:
        if not serving.plugin and not own:
            raise EngineError("own: it needs AMX")
        slowness = 1.0 if serving.plugin else 1.5
        started.append(Pretended(name, slowness, spoil, 0.0 if serving.plugin else noise))
        return started[-1]

    progress = Progress(Console(file=(tmp_path / "progress.txt").open("w")))
    made = script.Run(options, Files(None, tmp_path / "out.csv"), progress, start)
    made.run()
    assert all(engine.stopped for engine in started)
    return made.report


def rows(tmp_path: Path) -> list[dict[str, str]]:
    lines = (tmp_path / "out.csv").read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def test_without_a_gpu_it_is_one_line_and_status_2(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "gpu_engines.py: PyTorch finds no GPU here; --device cpu --tiny tries the script out"
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--part", "exact,fast"], "--part: expected some of exact, speed, got 'exact,fast'"),
        (["--layers", "6"], "--layers: expected a multiple of 4, got 6"),
        (["--drafts", "0,4"], "--drafts: expected some of 0,1,2,3, got '0,4'"),
        (["--engine-options", "[1]"], "--engine-options: expected a JSON object, got '[1]'"),
    ],
)
def test_arguments_that_cannot_be_are_one_line(
    script: ModuleType, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--device", "cpu", "--engine", "vllm", *flags]) == 2
    assert capsys.readouterr().err == f"gpu_engines.py: {message}\n"


def test_memory_that_both_engines_need_is_asked_for_beforehand(script: ModuleType) -> None:
    sizes = script.sizes_of(script.parse([]))
    script.check_memory(sizes, 78 << 30)
    with pytest.raises(ValueError, match=r"expected \d\d GiB of free memory on the GPU for both engines, got 40"):
        script.check_memory(sizes, 40 << 30)


def test_answers_of_transformers_are_counted_as_such(script: ModuleType, tmp_path: Path) -> None:
    report = run(script, tmp_path, "--part", "exact", "--drafts", "0,2", "--dtype", "float32,bfloat16")
    assert report.exit_code == 0, report.problems
    assert [(row.dtype, row.drafts, row.how) for row in report.exact] == [
        (dtype, drafts, how)
        for dtype in ("float32", "bfloat16")
        for drafts in (0, 2)
        for how in ("batched", "from the cache", "alone")
    ]
    for row in report.exact:
        assert row.equal == row.answers > 0
        assert row.gap == 0
        assert row.largest < 1e-4
        assert (row.cached > 0) == (row.how == "from the cache")
        assert row.as_without_drafts == (row.answers if row.drafts else None)
        assert (row.usual is None) == (row.dtype == "float32")


def test_another_token_in_float32_is_named_and_status_1_and_in_bfloat16_not(script: ModuleType, tmp_path: Path) -> None:
    def spoil(tokens: Tokens) -> Tokens:
        return (*tokens[:3], (tokens[3] + 1) % 2000, *tokens[4:])

    report = run(script, tmp_path, "--part", "exact", "--drafts", "0", "--dtype", "bfloat16", spoil=spoil)
    assert report.exit_code == 0, report.problems
    assert [row.equal for row in report.exact] == [0, 0, 0]
    prompt = script.tiny_prompts(TINY)[0]
    tokens = spoil(reference.greedy(TINY, prompt, ANSWER))
    truth = reference.distributions(TINY, prompt, tokens)[3]
    assert report.exact[0].gap >= float(truth.max() - truth[tokens[3]]) - 1e-5
    report = run(script, tmp_path, "--part", "exact", "--drafts", "0", "--dtype", "float32", spoil=spoil)
    assert report.exit_code == 1
    assert len(report.disagreements) == 3
    assert "batched: 0 of 6 answers are those of transformers in float32" in report.disagreements[0]


def test_times_are_those_of_a_step_and_of_a_first_token(script: ModuleType, tmp_path: Path) -> None:
    report = run(script, tmp_path, "--part", "speed", "--prefill", "1000", "--batch", "1,64")
    assert report.exit_code == 0, report.problems
    prefill, one, many = rows(tmp_path)
    assert list(prefill) == ["op", "shape", "ours_ms", "backend", "peer", "peer_ms", "ratio", "roof_pct"]
    assert (prefill["op"], prefill["shape"], prefill["backend"]) == ("engine prefill", "T=1000", "gluon+triton")
    assert float(prefill["ours_ms"]) == pytest.approx(1e3 * (FIXED + 1000 * TOKEN), rel=1e-3)
    # What reading the prompts takes is in neither.
    for row, shape in ((one, "B=1 context=36"), (many, "B=64 context=36")):
        assert (row["op"], row["shape"]) == ("engine decode", shape)
        assert float(row["ours_ms"]) == pytest.approx(1e3 * STEP, rel=1e-3)
        assert float(row["ratio"]) == pytest.approx(1.5, rel=1e-3)
        assert row["peer"] == "vLLM's own model"
    model = Slice(4, 16, 2048, hidden=256, intermediate=64)
    least = SliceWork(model).decode(36, batch=64) / 1e12
    assert float(many["roof_pct"]) == pytest.approx(100 * least / STEP, rel=1e-3)


def test_sides_that_disagree_are_not_timed(script: ModuleType, tmp_path: Path) -> None:
    report = run(script, tmp_path, "--part", "speed", noise=0.3)
    assert report.exit_code == 1
    assert report.disagreements[0].startswith("not timed: agreement on 8 prompts: |Δ log p| 0.1")
    assert rows(tmp_path) == []


def test_ours_is_timed_where_the_own_model_does_not_start(script: ModuleType, tmp_path: Path) -> None:
    report = run(script, tmp_path, "--part", "speed", own=False)
    assert report.exit_code == 2
    assert report.problems == ["own: it needs AMX"]
    assert [(row["peer_ms"], row["ratio"]) for row in rows(tmp_path)] == [("", "")] * 3


def test_nothing_is_begun_when_the_time_is_used_up(script: ModuleType, tmp_path: Path) -> None:
    report = run(script, tmp_path, "--within", "0")
    assert (report.exact, report.speed) == ([], [])
    assert sum("the time is used up" in line for line in report.header) == 7


def test_a_step_of_several_sequences_reads_an_expert_once_and_each_state() -> None:
    model = Slice(layers=4, experts=512)
    work = SliceWork(model)
    one, many = work.decode(1000), work.decode(1000, batch=64)
    state, keys = 3 * 2 * 32 * 128 * 128 * 4, 1000 * 2 * 2 * 256 * 2
    assert one - work.weights(1) == state + keys
    assert many - work.weights(64) == 64 * (state + keys)
    # All of the 512 experts are read in the end, and none twice.
    whole = work.weights(10**6) - work.weights(1)
    assert whole == pytest.approx(4 * 502 * 3 * 2048 * 512 * 2)


def test_weights_are_those_of_a_checkpoint_and_the_same_for_both_sides(script: ModuleType) -> None:
    config = type("Config", (), Slice(4, 16, 512, hidden=256, intermediate=64).config())
    serving = sys.modules["gpu_engines_serving"]
    first, second = (dict(serving.random_weights(config)) for _ in range(2))
    shapes = expected_shapes(Qwen3NextConfig.from_hf(config), target=True, mtp=False)
    assert {name: tuple(weight.shape) for name, weight in first.items()} == shapes
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    experts = [weight for name, weight in first.items() if name.endswith("gate_proj.weight") and ".experts." in name]
    assert len(experts) == 64
    assert len({float(weight.double().sum()) for weight in experts}) == len(experts)
    assert torch.stack(experts).float().std() == pytest.approx(256**-0.5, rel=0.05)


ENGINES = [
    pytest.param(
        name,
        marks=[
            pytest.mark.slow,
            getattr(pytest.mark, name),
            pytest.mark.skipif(find_spec(name) is None, reason=f"needs {name} in this environment"),
        ],
    )
    for name in ("vllm", "sglang")
]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_real_engine_gives_the_tokens_of_transformers_and_is_timed(engine: str, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    small = ["--device", "cpu", "--tiny", "--eager", "--dtype", "float32", "--drafts", "2", "--batch", "3"]
    command = [sys.executable, str(BENCHMARKS / "gpu_engines.py"), "--engine", engine, *small, "--csv", str(out)]
    done = subprocess.run([*command, "--logs", str(tmp_path)], capture_output=True, text=True, check=False)
    # SGLang's own model does not start on a CPU without AMX.
    own = engine == "vllm"
    assert done.returncode == (0 if own else 2), done.stdout + done.stderr
    text = out.read_text()
    assert text.count("answers are those of transformers in float32; |Δ log p|") == 3
    assert "# exact: float32 with 2 drafts, batched: 6 of 6 answers" in text
    assert "# exact: float32 with 2 drafts, alone: 2 of 2 answers" in text
    assert ("the first token is the same for" in text) == own
    prefill, decode = rows(tmp_path)
    assert (prefill["shape"], decode["shape"]) == ("T=96", "B=3 context=36")
    assert all(float(row["ours_ms"]) > 0 for row in (prefill, decode))
    assert all(float(row["ratio"] or 0) > 0 for row in (prefill, decode)) == own
