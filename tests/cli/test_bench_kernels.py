"""``qnext bench kernels`` on this CPU: every backend beside the reference, wrong ones found, nothing lost."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import qnext_kernels
from qnext_kernels.dispatch import OPERATION_NAMES, OPERATIONS, BackendError
from qnext_plugins.cli.bench import kernels
from qnext_plugins.cli.bench.cases import GROUPS
from qnext_plugins.cli.bench.command import app
from qnext_plugins.cli.bench.inputs import REAL, TINY, Library
from qnext_plugins.cli.bench.kernels import KernelsReport
from qnext_plugins.cli.bench.measure import outcome_of_ours

ALONE = ("--tiny", "--quick", "--no-peers", "--threads", "1")


class PyTorch(Library):
    """A peer: right in one operation, wrong in another, and broken in a third."""

    name, version = "PyTorch", torch.__version__

    def topk_softmax(self, top_k: int) -> tuple[str, Callable[..., Any]]:
        # Softmax of the best alone is softmax of all, renormalised.
        def route(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            best = logits.float().topk(top_k, dim=1)
            return best.values.softmax(dim=1), best.indices

        return "topk", route

    def gated_rms_norm(self, weight: torch.Tensor, eps: float) -> tuple[str, Callable[..., Any]]:
        return "mul", lambda x, z: x * z

    def delta_rule(self, heads: tuple[int, int, int]) -> Any:
        raise RuntimeError("has none")


class Apart(Library):
    """A peer with the parts of a Gated DeltaNet layer; its delta rule keeps states with the keys first."""

    name, version = "apart", "1"

    def convolution(self, weight: torch.Tensor, pool: torch.Tensor, heads: tuple[int, int, int]) -> Any:
        def convolve(x: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor | None, speculation: bool) -> Any:
            state = pool.transpose(1, 2)
            if starts is None:
                return qnext_kernels.causal_conv1d_decode(x, weight, state, slots)
            new = torch.zeros(len(slots), dtype=torch.bool)
            return qnext_kernels.causal_conv1d_prefill(x, weight, state, slots, starts, new)

        def verify(x: torch.Tensor, slots: torch.Tensor, *offsets: torch.Tensor) -> torch.Tensor:
            return qnext_kernels.causal_conv1d_verify(x, weight, pool.transpose(1, 2), slots[:, 0], *offsets)

        return SimpleNamespace(name=lambda call: "conv", convolve=convolve, verify=verify)

    def delta_rule(self, heads: tuple[int, int, int]) -> Any:
        def form(name: str) -> Callable[..., torch.Tensor]:
            def run(convolved: torch.Tensor, a: Any, b: Any, A_log: Any, dt_bias: Any, state: Any, *where: Any) -> Any:
                parts = convolved.split([heads[0] * heads[2]] * 2 + [heads[1] * heads[2]], dim=1)
                q, k, v = (part.unflatten(1, (-1, heads[2])) for part in parts)
                if name == "prefill":
                    where = (*where, torch.zeros(len(where[0]), dtype=torch.bool))
                own = state.transpose(2, 3).contiguous()
                function = getattr(qnext_kernels, f"gated_delta_rule_{name}")
                out = function(q, k, v, a, b, A_log, dt_bias, own, *(where[:1] if name == "decode" else where))
                state.copy_(own.transpose(2, 3))
                return out

            return run

        forms = ("prefill", "decode", "verify")
        names = dict.fromkeys(forms, "rule")
        return SimpleNamespace(key_first=True, names=names, **{name: form(name) for name in forms})

    def gated_rms_norm(self, weight: torch.Tensor, eps: float) -> tuple[str, Callable[..., Any]]:
        return "norm", lambda x, z: qnext_kernels.gated_rms_norm(x, z, weight, eps)


class WithoutNorm(Apart):
    """What lacks one of the parts has no layer."""

    name = "without norm"

    def gated_rms_norm(self, weight: torch.Tensor, eps: float) -> None:
        return None


def run(tmp_path: Path, *arguments: str) -> tuple[Result, KernelsReport]:
    file = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["kernels", *ALONE, "--json", str(file), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result, KernelsReport.model_validate_json(file.read_text())


def test_every_operation_and_form_of_the_kernels_has_rows() -> None:
    rows = [row for group in GROUPS for row in group(TINY, [])]
    assert {name for row in rows for name in row.operations} == set(OPERATION_NAMES)
    names, forms = ("delta rule", "conv", "gated delta net"), ("prefill", "decode", "verify")
    assert {f"{op} {form}" for op in names for form in forms} <= {row.op for row in rows}


def test_every_backend_that_serves_is_timed_beside_the_reference(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    result, report = run(tmp_path, "--ops", "delta rule decode,router", "--csv", str(table))
    assert result.exit_code == 0, result.output
    serving = {name for name, reason in report.backends["gated_delta_rule"].items() if reason is None}
    assert {row.backend for row in report.rows if row.op == "delta rule decode"} == serving
    assert "triton: runs on cuda, not on cpu" in " ".join(result.output.split())
    for row in report.rows:
        assert row.ms > 0
        assert row.peers == []
        assert row.reference_ratio is not None
        assert row.selected == (row.backend == OPERATIONS["moe"].backends[0].name) or row.op != "router top-k"
        assert row.reference_ratio == 1 or row.backend != "reference"
    with table.open() as file:
        lines = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert [line["backend"] for line in lines] == [row.backend for row in report.rows]
    assert float(lines[0]["ms"]) == pytest.approx(report.rows[0].ms, rel=1e-3)


def test_only_the_backends_that_are_asked_for_are_timed(tmp_path: Path) -> None:
    result, report = run(tmp_path, "--ops", "router", "--backend", "cpu")
    assert result.exit_code == 0, result.output
    assert [row.backend for row in report.rows] == ["cpu", "cpu"]
    assert all(row.reference_ratio is None for row in report.rows)


def test_backend_that_is_wrong_is_named_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = type(OPERATIONS["moe"].backends[0])
    right = backend.topk_softmax

    def wrong(self: Any, *arguments: Any) -> Any:
        weights, ids = right(self, *arguments)
        return weights * 1.1, ids

    monkeypatch.setattr(backend, "topk_softmax", wrong)
    result, report = run(tmp_path, "--ops", "router")
    assert result.exit_code == 2
    assert backend.name not in {row.backend for row in report.rows}
    serving = [name for name, reason in report.backends["moe"].items() if reason is None]
    assert len(report.rows) == 2 * (len(serving) - 1)
    assert f"router top-k T=40, {backend.name}: not timed; result 0 differs by 10.0% from reference" in report.problems


def test_backend_that_declines_the_call_is_neither_timed_nor_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = type(OPERATIONS["moe"].backends[0])

    def decline(self: Any, *arguments: Any) -> Any:
        raise BackendError("no backend serves moe.topk_softmax")

    monkeypatch.setattr(backend, "topk_softmax", decline)
    result, report = run(tmp_path, "--ops", "router")
    assert result.exit_code == 0
    assert report.problems == []
    assert report.rows
    assert backend.name not in {row.backend for row in report.rows}


def test_peer_is_timed_where_it_agrees_and_named_where_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "libraries_for", lambda *_: ([PyTorch()], {"other": "is not here"}))
    table = tmp_path / "table.csv"
    result, report = run(tmp_path, "--peers", "--ops", "router,gated rms,rule decode", "--csv", str(table))
    assert result.exit_code == 2
    assert "no peer other: is not here" in result.output
    for row in report.rows:
        assert [peer.kernel for peer in row.peers] == (["topk"] if row.op == "router top-k" else [])
        assert all(peer.ratio == pytest.approx(peer.ms / row.ms) for peer in row.peers)
    assert {row.op for row in report.rows} == {"router top-k", "gated rms norm", "delta rule decode"}
    assert any("gated rms norm T=40, PyTorch mul: not timed; result 0 differs" in line for line in report.problems)
    assert "delta rule decode B=1, PyTorch not made: not timed; RuntimeError: has none" in report.problems
    (header,) = (line for line in table.read_text().splitlines() if line.startswith("op,"))
    assert "PyTorch_kernel,PyTorch_ms,PyTorch_ratio" in header


def test_parts_of_a_library_make_up_the_layer_that_ours_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "libraries_for", lambda *_: ([Apart(), WithoutNorm()], {}))
    result, report = run(tmp_path, "--peers", "--ops", "gated delta net")
    assert result.exit_code == 0, result.output
    parts = ("gated_delta_rule", "causal_conv1d", "gated_norm")
    serving = [{name for name, reason in report.backends[part].items() if reason is None} for part in parts]
    forms = ("prefill", "decode", "verify")
    for form in forms:
        rows = [row for row in report.rows if row.op == f"gated delta net {form}"]
        assert {row.backend for row in rows} == set.intersection(*serving)
        assert {tuple(peer.kernel for peer in row.peers) for row in rows} == {("conv + rule + norm",)}
    assert {row.op for row in report.rows} == {f"gated delta net {form}" for form in forms}


def test_layer_is_compared_with_the_reference_of_all_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = OPERATIONS["gated_norm"].backends[0]
    right = type(backend).gated_rms_norm

    def wrong(*arguments: Any) -> None:
        right(*arguments)
        arguments[-1].mul_(1.1)

    monkeypatch.setattr(type(backend), "gated_rms_norm", wrong)
    result, report = run(tmp_path, "--ops", "gated delta net prefill")
    assert result.exit_code == 2
    assert backend.name not in {row.backend for row in report.rows}
    line = f"gated delta net prefill T=70, {backend.name}: not timed; result 0 differs by 10.0% from reference"
    assert line in report.problems


def test_results_before_an_interrupt_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def interrupted(case: Any) -> Any:
        seen.append(case)
        if len(seen) > 3:
            raise KeyboardInterrupt
        return outcome_of_ours(case)

    monkeypatch.setattr(kernels, "outcome_of_ours", interrupted)
    result, report = run(tmp_path, "--ops", "router", "--csv", str(tmp_path / "table.csv"))
    assert result.exit_code == 130
    assert {row.shape for row in report.rows} == {"T=40"}
    assert not report.complete
    assert report.problems == ["interrupted: what follows was not measured"]
    assert len((tmp_path / "table.csv").read_text().splitlines()) > 3


def test_shard_has_its_part_of_heads_experts_and_vocabulary() -> None:
    shard = REAL.shard(4)
    assert (shard.key_heads, shard.value_heads, shard.heads, shard.kv_heads) == (4, 8, 4, 1)
    assert (shard.intermediate, shard.vocabulary, shard.hidden, shard.experts) == (128, 37984, 2048, 512)
    assert shard.channels * 4 == REAL.channels


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--ops", "delta rule,rope of sand"), "--ops: expected words of attention decode, "),
        (("--ops", "silu"), "--ops: --quick has none of silu"),
        (("--backend", "fast"), "--backend: expected some of reference, "),
        (("--device", "abacus"), "--device: expected cpu"),
        (("--tp", "3"), "--tp: expected a number of ranks that divides 16 heads, got 3"),
        (("--threads", "9999"), f"--threads: expected at most the {len(os.sched_getaffinity(0))} cores"),
        (("--threads", "two"), "--threads: expected positive numbers with commas, such as 1,4, got 'two'"),
        (("--csv", "/"), "--csv: expected a file in a folder that can be written to, got /"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments: tuple[str, ...], line: str) -> None:
    result = CliRunner().invoke(app, ["kernels", *ALONE, *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"qnext bench kernels: {line}")
    assert result.stderr.count("\n") == 1
