"""Checkpoints in block-wise FP8 on a CPU: the tokens of transformers on what the numbers mean, in every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.layers.quantization import get_quantization_config
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8Config
from sglang.srt.server_args import ServerArgs

from qnext_plugins.cli.doctor import Status, Subject
from qnext_sglang import UnsupportedEngineError, experts, serving
from qnext_sglang.cpu.platform import CpuPlatform
from qnext_sglang.determinism import obstacles
from qnext_sglang.doctor import quantization
from qnext_sglang.quantization import expect_served
from tests.checkpoints import write_fp8_checkpoint
from tests.sglang.engines import engine
from tests.sglang.quantized import Checkpoints

SCALES = [
    f"{linear}.weight_scale_inv"
    for linear in (
        "model.layers.0.linear_attn.in_proj_qkvz",
        "model.layers.3.self_attn.v_proj",
        "model.layers.1.mlp.experts.5.up_proj",
        "model.layers.2.mlp.shared_expert.down_proj",
    )
]
"""Of one linear of each kind, merged with others or not, and of experts."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("fp8")
    write_fp8_checkpoint(folder / "fp8", folder / "float32")
    return Checkpoints(folder / "fp8", folder / "float32")


@pytest.mark.sglang
def test_tokens_equal_transformers_batched_alone_and_cached_and_follow_the_scales(
    checkpoints: Checkpoints, capfd: pytest.CaptureFixture[str]
) -> None:
    with engine(checkpoints.quantized, log_level="info") as running:
        checkpoints.expect_tokens_of_transformers(running)
        assert "4 decoder layers are one call" in "".join(capfd.readouterr())
        checkpoints.expect_answers_follow(running, SCALES)


@pytest.mark.sglang
def test_drafts_on_two_ranks_equal_transformers_cold_and_warm(checkpoints: Checkpoints) -> None:
    prompts = checkpoints.prompts
    with engine(checkpoints.quantized, drafts=3, tp_size=2) as running:
        assert checkpoints.first_difference(running, prompts) is None
        assert checkpoints.first_difference(running, prompts) is None
        assert running.cached_tokens > 0
    assert 0 < running.drafts.accepted < running.drafts.drafted


@pytest.mark.sglang
def test_in_the_deterministic_mode_an_answer_is_the_same_alone_and_among_others_and_as_close_as_transformers(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QNEXT_DETERMINISTIC", "1")
    with engine(checkpoints.quantized, dtype="bfloat16") as running:
        checkpoints.expect_independent_and_close(running)


def block_fp8(**options: Any) -> Fp8Config:
    return CpuPlatform().get_quantization_config("fp8")(True, weight_block_size=[128, 128], **options)


def test_the_platform_serves_fp8_in_float32_too_and_leaves_other_quantizations_to_sglang() -> None:
    assert get_quantization_config("fp8") is CpuPlatform().get_quantization_config("fp8")
    assert torch.float32 in block_fp8().get_supported_act_dtypes()
    assert CpuPlatform().get_quantization_config("mxfp8") is None


@pytest.mark.parametrize(
    ("quant_config", "found"),
    [
        (Fp8Config(), "fp8"),
        (Fp8Config(True, weight_block_size=[64, 128]), r"fp8 in blocks of \[64, 128\]"),
        (W8A8Int8Config({}), "w8a8_int8"),
    ],
    ids=["a scale a tensor", "other blocks", "int8"],
)
def test_other_quantizations_end_the_start_with_their_name(quant_config: Any, found: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=rf"quantized \({found}\), and it serves FP8 in blocks of"):
        expect_served(quant_config)


def test_on_sglangs_own_engine_for_cpus_other_quantizations_stay_sglangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "on_plain_cpu", lambda: False)
    expect_served(W8A8Int8Config({}))
    assert experts.our_method(W8A8Int8Config({}), "experts", 256, torch.device("cpu"), torch.bfloat16) is None


def test_block_wise_fp8_is_served_in_the_deterministic_mode_too() -> None:
    expect_served(None)
    expect_served(block_fp8())
    assert not obstacles(ServerArgs(model_path="checkpoint"), None, block_fp8())


def test_experts_of_which_a_rank_has_half_blocks_end_the_start() -> None:
    cpu = torch.device("cpu")
    assert type(experts.our_method(block_fp8(), "experts", 256, cpu, torch.float32)) is experts.QnextFp8MoEMethod
    with pytest.raises(UnsupportedEngineError, match="a rank's 64 columns of them are not whole blocks of FP8"):
        experts.our_method(block_fp8(), "experts", 64, cpu, torch.float32)


def test_a_missing_scale_is_named_before_anything_is_loaded(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.expect_missing_is_named("mtp.layers.0.self_attn.k_proj.weight_scale_inv", tmp_path)


@pytest.mark.parametrize(
    ("quantized", "status"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Status.OK),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, Status.FAILURE),
        ({"quant_method": "awq"}, Status.FAILURE),
    ],
)
def test_the_doctor_tells_which_quantization_is_served(quantized: dict[str, Any], status: Status) -> None:
    finding = quantization(Subject(config={"quantization_config": quantized}))
    assert finding is not None
    assert finding.status is status
