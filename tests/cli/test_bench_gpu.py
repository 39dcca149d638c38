"""What times kernels on a GPU, as far as it runs without one: rows, checks, peers of PyTorch, counts, tables, plots."""

from __future__ import annotations

import csv
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from qnext_kernels import force_backend
from qnext_kernels.gated_delta_net import triton_fused
from qnext_kernels.gated_delta_net.triton_fused import run_fused
from qnext_kernels.gated_delta_rule import triton_chunked, triton_math, triton_recurrent, triton_state, triton_token
from qnext_kernels.gated_delta_rule.triton import TritonGatedDeltaRule
from qnext_plugins.cli.bench import cases, gated_delta_net, kernels
from qnext_plugins.cli.bench.gpus import data_sheet
from qnext_plugins.cli.bench.inputs import GPU, GPU_QUICK, TINY, Library, Part, Row, Sizes, ragged
from qnext_plugins.cli.bench.kernels import KernelsBench, Measured, Options, PeerTime
from qnext_plugins.cli.bench.measure import difference, outcome_of_ours
from qnext_plugins.cli.bench.output import Files
from qnext_plugins.cli.bench.roofs import Roofs
from qnext_plugins.cli.bench.torch_peers import TorchPeers
from qnext_plugins.cli.progress import Progress
from tests.kernels.triton.interpreter import interpreted, kernel_modules

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = Sizes(
    hidden=64,
    key_heads=2,
    value_heads=4,
    linear_dim=32,
    experts=12,
    top_k=3,
    intermediate=32,
    heads=4,
    head_dim=64,
    rotary_dim=16,
    vocabulary=128,
    expert_tokens=(3, 50),
    prefills=(70,),
    conv_prefills=(70,),
    contexts=(200,),
    batches=(1, 3),
    packed=((65, 5, 0, 30),),
    prefills_alone=(130,),
    linear_tokens=(1, 5),
    rows=(20, 1),
)


@pytest.fixture
def quiet() -> Progress:
    return Progress(Console(file=open(os.devnull, "w")))


def rows_of(sizes: Sizes, libraries: list[Library] | None = None) -> list[Row]:
    return [row for group in cases.GROUPS for row in group(sizes, libraries or [])]


def options(**changes: Any) -> Options:
    return Options(**{"sizes": {1: SMALL}, "peers": False, "seconds": 0.01, "quick": False} | changes)


@pytest.mark.parametrize("sizes", [GPU, GPU_QUICK])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_rank_of_tensor_parallelism_has_rows_of_steps_and_of_prefills(sizes: Sizes, ranks: int) -> None:
    rows = rows_of(sizes.shard(ranks))
    assert {row.op for row in rows if row.stepped} & {"experts", "delta rule decode", "conv verify"}
    assert {row.shape for row in rows if row.op == "delta rule prefill"} >= {"T=2048", "T=32768 N=16 ragged"}
    assert all(not row.stepped for row in rows if "prefill" in row.op)


def test_gpu_shapes_reach_from_one_sequence_to_1024_and_from_2048_tokens_to_65536() -> None:
    shapes = {(row.op, row.shape) for row in rows_of(GPU)}
    assert {("delta rule decode", "B=1"), ("delta rule decode", "B=1024")} <= shapes
    assert {("delta rule prefill", "T=2048"), ("delta rule prefill", "T=65536")} <= shapes


@pytest.mark.parametrize(("sequences", "mean"), [(16, 2048), (64, 512), (1, 10)])
def test_ragged_lengths_have_their_mean_and_differ(sequences: int, mean: int) -> None:
    lengths = ragged(sequences, mean)
    assert len(lengths) == sequences
    assert sum(lengths) == sequences * mean
    assert min(lengths) > 0
    assert len(set(lengths)) == sequences


@pytest.mark.parametrize(
    ("op", "shape", "flops", "moved"),
    [
        # A state of 32 heads of 128 × 128 in float32 is read and written: 4 MiB a sequence, and 7 FLOP an element.
        ("delta rule decode", "B=64", 234_881_024, 268_435_456),
        # Read once, written after each of three tokens.
        ("delta rule verify", "B=64 × 3 tokens", 704_643_072, 536_870_912),
        # 8192 channels in and 4096 out, in bfloat16, and one state.
        ("delta rule prefill", "T=2048", 7_516_192_768, 52_428_800),
        # 16 sequences, 16 states.
        ("delta rule prefill", "T=32768 N=16 ragged", 120_259_084_288, 838_860_800),
        # Tokens in and out, and windows of three inputs read and written, of 8192 channels in bfloat16.
        ("conv decode", "B=64", 4_194_304, 8_388_608),
        # A token is 12288 + 64 numbers in and 4096 out; a sequence has its window and its state, read and written.
        ("gated delta net decode", "B=64", 239_075_328, 276_832_256),
        # Three tokens, a window of five inputs, and the state read once and written three times.
        ("gated delta net verify", "B=64 × 3 tokens", 717_225_984, 553_672_704),
        # 2048 tokens in and out, one window of three inputs and one state.
        ("gated delta net prefill", "T=2048", 7_650_410_496, 69_566_464),
        ("linear qkvz", "M=64 2048→12288", 3_221_225_472, 52_166_656),
    ],
)
def test_work_of_a_row_is_that_counted_by_hand(op: str, shape: str, flops: int, moved: int) -> None:
    (row,) = (row for row in rows_of(GPU) if (row.op, row.shape) == (op, shape))
    with torch.device("meta"):
        case = row.build()
    assert case.flops == flops
    assert case.moved == moved


def test_work_of_experts_is_that_counted_by_hand() -> None:
    (row,) = (row for row in rows_of(TINY) if (row.op, row.shape) == ("experts", "M=1"))
    case = row.build()
    assert case.flops == 10 * 3 * 2 * 256 * 64  # ten experts of three matrices
    assert case.moved == 10 * 3 * 256 * 64 * 2 + 2 * 256 * 2  # in bfloat16, and a token in and out


def test_part_of_a_long_row_is_what_the_reference_says_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cases, gated_delta_net):
        monkeypatch.setattr(module, "PART", 256)
    torch.manual_seed(0)
    sizes = Sizes(
        **vars(SMALL)
        | {"expert_tokens": (300,), "prefills": (300,), "conv_prefills": (300,), "packed": ((300, 0, 270),)}
    )
    seen = set()
    # The reference of a whole does not serve in the deterministic mode.
    for row in (row for row in rows_of(sizes) if "deterministic" not in row.op):
        if ("prefill" in row.op or row.op == "experts") and (case := row.build()).part is not None:
            with force_backend("reference"), torch.inference_mode():
                part = case.part.ours()
                whole = case.part.of(*outcome_of_ours(case))
            assert difference(whole, part, tolerance=1e-2) is None, row
            assert sum(tensor.numel() for tensor in part) > 0
            seen.add(row.op)
    assert {"experts", "attention prefill", "delta rule prefill", "conv prefill", "gated delta net prefill"} <= seen


def test_the_reference_of_a_part_makes_its_tensors_where_the_inputs_are(quiet: Progress) -> None:
    (row,) = (row for row in rows_of(SMALL) if (row.op, row.shape) == ("conv prefill", "T=70"))
    case = row.build()
    case.part = Part(lambda: (torch.ones(2),), lambda *_: ())
    bench = KernelsBench(options(), Files(None, None), quiet)
    bench.options, bench.default_device = options(device="meta"), torch.device("meta")
    (made,) = bench._check(replace(row, heavy=True), case).part or ()
    assert made.device.type == "meta"


def test_peers_of_pytorch_agree_with_the_reference_on_every_operation_they_have(
    monkeypatch: pytest.MonkeyPatch, quiet: Progress
) -> None:
    library = TorchPeers(compile=lambda function: function)
    monkeypatch.setattr(kernels, "libraries_for", lambda *_: ([library], {}))
    bench = KernelsBench(options(peers=True, ops=("experts", "attention", "linear", "r")), Files(None, None), quiet)
    bench.run()
    assert bench.report.problems == []
    compared = {row.op for row in bench.report.rows if row.peers}
    elementwise = {"rms norm + residual", "gated rms norm", "qk norm + rope + gate", "router top-k"}
    assert {"experts", "attention prefill", "attention decode", "linear out"} | elementwise <= compared


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Any:
    with interpreted(triton_math, triton_token, triton_recurrent, triton_chunked, triton_state):
        yield


def run_interpreted(
    gpu_ops: ModuleType, quiet: Progress, ops: tuple[str, ...], backends: tuple[str, ...] = ("triton",)
) -> Any:
    chosen = options(backends=backends, ops=ops, time_reference=False, quick=True)
    bench = KernelsBench(chosen, Files(None, None), quiet, gpu_ops.OpsReport)
    bench.run()
    return bench.report


def test_triton_is_checked_with_the_reference_which_is_not_timed(
    triton: None, gpu_ops: ModuleType, quiet: Progress
) -> None:
    report = run_interpreted(gpu_ops, quiet, ("delta rule decode", "delta rule verify"))
    assert report.problems == []
    assert [(row.op, row.shape, row.backend) for row in report.rows] == [
        (f"delta rule {op}", shape, "triton")
        for op, shapes in (("decode", ("B=1", "B=3")), ("verify", ("B=1 × 3 tokens", "B=3 × 3 tokens")))
        for shape in shapes
    ]
    assert report.exit_code == 0


def test_a_prefill_in_segments_is_a_row_beside_the_one_from_chunk_to_chunk(
    gpu_ops: ModuleType, quiet: Progress
) -> None:
    backends = "triton", "triton_context_parallel"
    with interpreted(*kernel_modules()):
        report = run_interpreted(gpu_ops, quiet, ("delta rule prefill",), backends)
    assert report.problems == []
    # The deterministic mode has one walk.
    *rows, alone = ((row.op, row.shape, row.backend) for row in report.rows)
    shapes = dict.fromkeys((op, shape) for op, shape, _ in rows)
    assert shapes
    assert rows == [(*shape, name) for shape in shapes for name in backends]
    assert alone == ("delta rule prefill, deterministic", "T=130", "triton")


def test_one_kernel_for_a_layer_is_checked_with_the_reference_of_its_parts(
    gpu_ops: ModuleType, quiet: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[int] = []

    def fused(*arguments: Any, **options: Any) -> torch.Tensor:
        launched.append(len(arguments[0]))
        return run_fused(*arguments, **options)

    monkeypatch.setattr(triton_fused, "run_fused", fused)
    with interpreted(*kernel_modules()):
        report = run_interpreted(gpu_ops, quiet, ("gated delta net decode", "gated delta net verify"))
    assert report.problems == []
    assert [(row.op, row.shape, row.backend) for row in report.rows] == [
        (f"gated delta net {op}", shape, "triton")
        for op, shapes in (("decode", ("B=1", "B=3")), ("verify", ("B=1 × 3 tokens", "B=3 × 3 tokens")))
        for shape in shapes
    ]
    assert set(launched) == {1, 3, 9}


def test_a_wrong_state_is_named_and_makes_the_exit_status_1(
    triton: None, gpu_ops: ModuleType, quiet: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TritonGatedDeltaRule.decode

    def wrong(self: Any, *arguments: Any) -> torch.Tensor:
        out = right(self, *arguments)
        arguments[-2][arguments[-1].long()] *= 1.05
        return out

    monkeypatch.setattr(TritonGatedDeltaRule, "decode", wrong)
    report = run_interpreted(gpu_ops, quiet, ("delta rule decode",))
    assert report.rows == []
    assert report.disagreements == [
        f"delta rule decode B={batch}, triton: not timed; result 1 differs by 5.0% from reference" for batch in (1, 3)
    ]
    assert report.exit_code == 1


def test_outcomes_differ_where_one_is_nan_or_of_another_size_or_beyond_the_tolerance() -> None:
    one = [torch.ones(4)]
    assert difference(one, one) is None
    assert difference([torch.zeros(4)], [torch.zeros(4)]) is None
    assert difference([torch.ones(4) * 1.01], one) is None
    assert difference([torch.ones(4) * 1.02], one) == "result 0 differs by 2.0%"
    assert difference([torch.full((4,), float("nan"))], one) == "result 0 differs by nan%"
    assert difference(one, [torch.zeros(4)]) == "result 0 differs by inf%"
    assert difference([torch.ones(5)], one) == "result 0 has shape [5] in place of [4]"


def test_roof_is_the_data_sheets_name_and_the_product_of_the_dtype() -> None:
    roofs = Roofs(bandwidth={1: 4e12}, copy={1: 4e12}, bf16={1: 8e14}, float32={1: 5e13}, fp8={1: 1.5e15})
    assert roofs.seconds(1, flops=8e14, moved=4e9) == (1.0, "bf16 GEMM")
    assert roofs.seconds(1, flops=1.5e15, moved=4e9, dtype="fp8") == (1.0, "fp8 GEMM")
    assert roofs.seconds(1, flops=8e11, moved=4e12) == (1.0, "memory")
    assert data_sheet("NVIDIA H200") == (4.8, 989, 1979)
    assert data_sheet("NVIDIA H100 80GB HBM3") == (3.35, 989, 1979)
    assert data_sheet("NVIDIA A100-SXM4-80GB") == (2.039, 312, None)
    assert data_sheet("NVIDIA GeForce RTX 4090") == (1.008, 165, 330)
    assert data_sheet("AMD Instinct MI300X") == (5.3, 1307, 2615)
    assert data_sheet("Abacus") is None


def synthetic(gpu_ops: ModuleType) -> Any:
    report = gpu_ops.OpsReport(device="cuda", backends={}, libraries={}, absent={}, rows=[])
    report.header = ["device: NVIDIA H200", "versions: torch 2.11.0"]
    for batch, ms in ((1, 0.004), (64, 0.08)):
        peers = [PeerTime(library="fla", kernel="fused_recurrent", ms=2 * ms, ratio=2, one_by_one_ms=0.3)]
        report.rows.append(
            Measured(
                op="delta rule decode",
                shape=f"B={batch} tp=4",
                backend="triton",
                selected=True,
                threads=1,
                ms=ms,
                one_by_one_ms=0.1,
                peers=peers,
                roof_percent=80.0,
                roof="memory",
            )
        )
    report.rows.append(
        Measured(op="experts", shape="M=4", backend="triton", selected=True, threads=1, ms=1.5, peers=[])
    )
    return report


def test_csv_has_a_line_for_each_peer_and_the_launches_under_a_name_of_their_own(
    gpu_ops: ModuleType, tmp_path: Path
) -> None:
    Files(None, tmp_path / "ops.csv").write(synthetic(gpu_ops))
    assert (tmp_path / "ops.csv").read_text().splitlines() == [
        "# device: NVIDIA H200",
        "# versions: torch 2.11.0",
        "op,shape,ours_ms,backend,peer,peer_ms,ratio,roof_pct",
        "delta rule decode,B=1 tp=4,0.004,triton,fla fused_recurrent,0.008,2,80",
        '"delta rule decode, one by one",B=1 tp=4,0.1,triton,fla fused_recurrent,0.3,3,',
        "delta rule decode,B=64 tp=4,0.08,triton,fla fused_recurrent,0.16,2,80",
        '"delta rule decode, one by one",B=64 tp=4,0.1,triton,fla fused_recurrent,0.3,3,',
        "experts,M=4,1.5,triton,,,,",
    ]


def test_plots_are_drawn_from_the_csv(gpu_ops: ModuleType, tmp_path: Path) -> None:
    Files(None, tmp_path / "ops.csv").write(synthetic(gpu_ops))
    plots = sys.modules["gpu_plots"]
    assert plots.main([str(tmp_path / "ops.csv"), str(tmp_path / "plots")]) == 0
    for name in ("ratios.png", "roofs.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "ops.csv").open() as file:
        lines = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert plots.size_of(lines[0]["shape"]) == (1, "tp=4")
    assert plots.size_of("B=64 × 3 tokens") == (64, "× 3 tokens")


def test_without_matplotlib_plots_are_left_out_in_one_line(
    gpu_ops: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = sys.modules["gpu_plots"].write_plots(tmp_path / "plots", "", [])
    assert said == "plots need matplotlib (pip install matplotlib); none were written"
    assert not (tmp_path / "plots").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_one_line(gpu_ops: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_ops.main(["--quick"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "PyTorch finds no GPU here" in said.err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--backend", "fast"], "--backend: expected some of reference, "),
        (["--tp", "3"], "expected a number of ranks that divides 16 heads, got 3"),
        (["--tp", "two"], "--tp: expected positive numbers with commas"),
        (["--csv", "/"], "--csv: expected a file in a folder that can be written to"),
    ],
)
def test_wrong_arguments_are_named(gpu_ops: ModuleType, arguments: list[str], line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)):
        gpu_ops.options_of(gpu_ops.parse(arguments))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGpu:
    def test_both_clocks_agree_on_what_takes_long(self) -> None:
        from qnext_plugins.cli.bench.cuda import EventClock, GraphClock

        a = torch.ones(1 << 28, device="cuda")
        b = torch.empty_like(a)

        def negate(turn: int) -> object:
            # A kernel: what a graph copies need not take the way of a copy that is launched.
            return torch.neg(a, out=b)

        event, graph = EventClock(), GraphClock(negate, 8)
        event(negate, 0)
        seconds = min(event(negate, turn) for turn in range(5)), min(graph() for _ in range(5))
        assert seconds[0] == pytest.approx(seconds[1], rel=0.1)

    def test_small_sizes_run_to_the_end(self, gpu_ops: ModuleType, tmp_path: Path) -> None:
        status = gpu_ops.main(["--tiny", "--peers", "torch", "--csv", str(tmp_path / "ops.csv")])
        assert status == 0, (tmp_path / "ops.csv").read_text()
        assert len((tmp_path / "ops.csv").read_text().splitlines()) > 10
