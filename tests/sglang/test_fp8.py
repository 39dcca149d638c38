"""Checkpoints in block-wise FP8 on a CPU: the tokens of transformers on what the numbers mean, in every mode."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sglang.srt.layers.quantization import get_quantization_config
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8Config
from sglang.srt.server_args import ServerArgs
from transformers import AutoConfig

from qnext_plugins.cli.doctor import Status, Subject
from qnext_plugins.model import CheckpointError, Qwen3NextConfig, check_files, expected_shapes
from qnext_sglang import UnsupportedEngineError, experts, serving
from qnext_sglang.cpu.platform import CpuPlatform
from qnext_sglang.determinism import obstacles
from qnext_sglang.doctor import quantization
from qnext_sglang.quantization import expect_served, shapes_on_cpu
from tests import reference
from tests.checkpoints import write_fp8_checkpoint
from tests.determinism import Requests, alone, among
from tests.reference import Tokens, first_difference
from tests.sglang.engines import Engine, engine

SCALES = (
    "model.layers.0.linear_attn.in_proj_qkvz",
    "model.layers.3.self_attn.v_proj",
    "model.layers.1.mlp.experts.5.up_proj",
    "model.layers.2.mlp.shared_expert.down_proj",
)
"""Of one linear of each kind, merged with others or not, and of experts."""
MAX_TOKENS = 24


class Checkpoints(NamedTuple):
    fp8: Path
    float32: Path
    """The same weights, dequantized."""

    @property
    def prompts(self) -> tuple[Tokens, ...]:
        return reference.prompts(self.float32)[::4]

    def first_difference(self, running: Engine, prompts: tuple[Tokens, ...]) -> str | None:
        """Between an engine's greedy tokens and transformers'."""
        expected = [reference.greedy(self.float32, prompt, MAX_TOKENS) for prompt in prompts]
        return first_difference(expected, running.greedy(prompts, MAX_TOKENS))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("fp8")
    write_fp8_checkpoint(folder / "fp8", folder / "float32")
    return Checkpoints(folder / "fp8", folder / "float32")


@pytest.mark.sglang
def test_tokens_equal_transformers_batched_alone_and_cached_and_follow_the_scales(
    checkpoints: Checkpoints, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = checkpoints.prompts
    with engine(checkpoints.fp8, log_level="info") as running:
        assert checkpoints.first_difference(running, prompts) is None
        assert "4 decoder layers are one call" in "".join(capfd.readouterr())
        for prompt in prompts[::3]:
            assert checkpoints.first_difference(running, (prompt,)) is None
        assert running.cached_tokens > 0
        before = running.greedy(prompts, MAX_TOKENS)
        with safe_open(checkpoints.fp8 / "model.safetensors", "pt") as file:
            for linear in SCALES:
                name, scale = f"{linear}.weight_scale_inv", file.get_tensor(f"{linear}.weight_scale_inv")
                running.update(name, -scale)
                assert running.greedy(prompts, MAX_TOKENS) != before, name
                running.update(name, scale)
        assert running.greedy(prompts, MAX_TOKENS) == before


@pytest.mark.sglang
def test_drafts_on_two_ranks_equal_transformers_cold_and_warm(checkpoints: Checkpoints) -> None:
    prompts = checkpoints.prompts
    with engine(checkpoints.fp8, drafts=3, tp_size=2) as running:
        assert checkpoints.first_difference(running, prompts) is None
        assert checkpoints.first_difference(running, prompts) is None
        assert running.cached_tokens > 0
    assert 0 < running.drafts.accepted < running.drafts.drafted


@pytest.mark.sglang
def test_in_the_deterministic_mode_an_answer_is_the_same_alone_and_among_others_and_as_close_as_transformers(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QNEXT_DETERMINISTIC", "1")
    requests = Requests.of(reference.prompts(checkpoints.float32))
    with engine(checkpoints.fp8, dtype="bfloat16") as running:
        expected = alone(running, requests.greedy)
        assert among(running, requests.greedy, requests.others) == expected
        results = running.greedy_with_log_probs(checkpoints.prompts, MAX_TOKENS)
    assert reference.bfloat16_error_ratio(checkpoints.float32, checkpoints.prompts, results) < 1.3


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
    checkpoint = shutil.copytree(checkpoints.fp8, tmp_path / "checkpoint")
    stored = json.loads((checkpoint / "config.json").read_text())
    quant_config = CpuPlatform().get_quantization_config("fp8").from_config(stored["quantization_config"])
    shapes = expected_shapes(Qwen3NextConfig.from_hf(AutoConfig.from_pretrained(checkpoint)), mtp=True)
    shapes = shapes_on_cpu(quant_config, shapes)
    check_files(checkpoint, shapes)
    weights, gone = load_file(checkpoint / "model.safetensors"), "mtp.layers.0.self_attn.k_proj.weight_scale_inv"
    del weights[gone]
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"missing {gone}$"):
        check_files(checkpoint, shapes)


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
