"""Checkpoints in block-wise FP8 on a CPU: the tokens of transformers on what their weights stand for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import EngineArgs

from qnext_plugins.model import CheckpointError
from qnext_vllm.model import Qwen3NextForCausalLM
from tests import reference
from tests.checkpoints import write_fp8_checkpoint
from tests.determinism import Requests, alone, among
from tests.reference import Tokens, first_difference
from tests.vllm.engines import engine
from tests.vllm.test_speculation import assert_partly_rejected

pytestmark = pytest.mark.vllm

ONE_CALL = "4 decoder layers are one call"
LOG_PROB_TOLERANCE = 1e-3
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a checkpoint in FP8 and what it stands for in float32."""
    made = tmp_path_factory.mktemp("checkpoints")
    write_fp8_checkpoint(made / "fp8", made / "float32")
    return made


def with_another_scale(checkpoint: Path, name: str, copy: Path) -> Path:
    """A copy of a checkpoint in which the last block of a matrix stands for other values."""
    weights = load_file(shutil.copytree(checkpoint, copy) / "model.safetensors")
    weights[f"{name}_scale_inv"][-1, -1] *= -8
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy


def prefers(checkpoint: Path, prompt: Tokens, answer: Tokens) -> Tokens:
    """The token that transformers would choose in the place of each of an answer, behind those in front of it."""
    return tuple(reference.distributions(checkpoint, prompt, answer).argmax(dim=1).tolist())


def test_tokens_equal_transformers_with_drafts_cold_cached_alone_and_loaded_again(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fp8, truth = folder / "fp8", folder / "float32"
    prompts = reference.prompts(truth)[::5]
    with engine(fp8, drafts=2) as running:
        results = running.greedy_with_log_probs(prompts, MAX_TOKENS)
        expected = [tokens for tokens, _ in results]
        chosen = [prefers(truth, *pair) for pair in zip(prompts, expected, strict=True)]
        assert first_difference(chosen, expected) is None
        assert reference.largest_error(truth, prompts, results) < LOG_PROB_TOLERANCE
        before = running.prefix_cache_hits()
        assert first_difference(expected, running.greedy(prompts, MAX_TOKENS)) is None
        assert running.prefix_cache_hits() > before
        assert first_difference(expected[-2:], [running.greedy([p], MAX_TOKENS)[0] for p in prompts[-2:]]) is None
        assert_partly_rejected(running)
        for name in ("linear_attn.out_proj", "mlp.experts.7.down_proj", "mlp.shared_expert.up_proj"):
            other = with_another_scale(fp8, f"model.layers.0.{name}.weight", tmp_path / name)
            running.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
            assert running.llm.reset_prefix_cache()
            assert running.greedy(prompts, MAX_TOKENS) != expected, name
        running.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(fp8)})
        assert running.llm.reset_prefix_cache()
        assert first_difference(expected, running.greedy(prompts, MAX_TOKENS)) is None
    assert ONE_CALL in "".join(capfd.readouterr())


def test_in_bfloat16_compiled_an_answer_has_the_same_bits_alone_and_among_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    truth = folder / "float32"
    requests = Requests.of(reference.prompts(truth))
    monkeypatch.setenv("QNEXT_DETERMINISTIC", "1")
    with engine(folder / "fp8", dtype="bfloat16", eager=False, max_num_batched_tokens=160) as running:
        expected = alone(running, requests.greedy)
        assert among(running, requests.greedy, requests.others[:12]) == expected
    assert ONE_CALL in "".join(capfd.readouterr())
    results = [(answer.tokens, torch.tensor(answer.log_probs)) for answer in expected]
    prompts = [request.prompt for request in requests.greedy]
    assert reference.bfloat16_error_ratio(truth, prompts, results) < 1.0


def test_a_missing_scale_is_named_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(folder / "fp8", tmp_path / "checkpoint")
    config = EngineArgs(str(checkpoint), dtype="bfloat16", max_model_len=128).create_engine_config()
    weights = load_file(checkpoint / "model.safetensors")
    gone = "model.layers.3.self_attn.k_proj.weight_scale_inv"
    del weights[gone]
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"missing {gone}$"):
        Qwen3NextForCausalLM(vllm_config=config)


def test_two_ranks_of_whole_blocks_give_the_tokens_of_one(folder: Path) -> None:
    truth = folder / "float32"
    prompts = reference.prompts(truth)[12::12]
    with engine(folder / "fp8", tensor_parallel_size=2) as running:
        answers = running.greedy(prompts, MAX_TOKENS)
    chosen = [prefers(truth, *pair) for pair in zip(prompts, answers, strict=True)]
    assert first_difference(chosen, answers) is None
