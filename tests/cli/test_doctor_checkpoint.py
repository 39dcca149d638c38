"""The checkpoint that ``qnext doctor --model`` names: what is wrong with it is told, and told once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qnext_plugins.cli.checkpoint import Kind, Spec, plan, write
from qnext_plugins.cli.checkpoint.spec import TINY as WIDTHS
from qnext_plugins.cli.doctor import Finding, Status
from qnext_plugins.cli.doctor import checkpoint_checks as checks
from qnext_plugins.cli.doctor.findings import run_checks
from tests.checkpoints import TINY


def checked(folder: Path) -> dict[str, Finding]:
    subject = checks.subject_of(str(folder))
    return {result.name: result for result in run_checks("checkpoint", checks.CHECKS, subject)}


def edited(folder: Path, **changes: Any) -> Path:
    """The trained checkpoint with other fields in its config.json; None removes one."""
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def test_a_field_that_is_not_served_is_told_by_its_name(tmp_path: Path) -> None:
    finding = checked(edited(tmp_path / "checkpoint", hidden_act="gelu"))["checkpoint.architecture"]
    assert finding.status == Status.FAILURE
    assert "hidden_act: expected 'silu', got 'gelu'" in finding.message


@pytest.mark.parametrize(
    ("field", "value"), [("num_experts", "sixteen"), ("num_attention_heads", 0), ("num_hidden_layers", None)]
)
def test_a_field_that_is_missing_or_of_another_type_is_told_once(field: str, value: Any, tmp_path: Path) -> None:
    results = checked(edited(tmp_path / "checkpoint", **{field: value}))
    (name,) = (name for name, result in results.items() if result.status == Status.FAILURE)
    assert name == "checkpoint.architecture"
    assert results[name].message.startswith("config.json: ")
    assert field in results[name].message


def test_a_config_that_disagrees_with_the_tensors_is_told(tmp_path: Path) -> None:
    finding = checked(edited(tmp_path / "checkpoint", num_experts=17))["checkpoint.weights"]
    assert finding.status == Status.FAILURE
    assert "model.layers.0.mlp.gate.weight" in finding.message


def test_another_architecture_is_told(tmp_path: Path) -> None:
    results = checked(edited(tmp_path / "checkpoint", architectures=["Qwen3ForCausalLM"]))
    assert results["checkpoint.architecture"].status == Status.FAILURE
    assert "checkpoint.weights" not in results


def test_a_missing_shard_is_told(tmp_path: Path) -> None:
    folder = edited(tmp_path / "checkpoint")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    finding = checked(folder)["checkpoint.weights"]
    assert finding.status == Status.FAILURE
    assert "model-00002-of-00002.safetensors" in finding.message


def test_a_file_that_was_cut_off_is_told(tmp_path: Path) -> None:
    folder = edited(tmp_path / "checkpoint")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    finding = checked(folder)["checkpoint.weights"]
    assert finding.status == Status.FAILURE
    assert f"{folder / 'model.safetensors'} cannot be read" in finding.message


def test_an_index_that_is_none_is_told_once(tmp_path: Path) -> None:
    folder = edited(tmp_path / "checkpoint")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    results = checked(folder)
    assert [name for name, result in results.items() if result.status == Status.FAILURE] == ["checkpoint.weights"]
    assert "expected a weight_map" in results["checkpoint.weights"].message


def test_a_checkpoint_without_draft_is_complete_but_does_not_speculate(tmp_path: Path) -> None:
    folder = edited(tmp_path / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("mtp.")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    finding = checked(folder)["checkpoint.weights"]
    assert finding.status == Status.NOTE
    assert "speculation will not start" in finding.message


@pytest.mark.parametrize("quantized", [{"fp8": True}, {"int4": 32}], ids=["fp8", "int4"])
def test_the_shapes_of_what_our_kernels_read_are_checked(quantized: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write(plan(Spec(kind=Kind.TINY, widths=WIDTHS, **quantized)), folder)
    assert checked(folder)["checkpoint.weights"].message.startswith("every tensor of the model and of its draft")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(("weight_scale", "weight_scale_inv")))
    weights[name] = weights[name][:1, :0].contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    finding = checked(folder)["checkpoint.weights"]
    assert finding.status == Status.FAILURE
    assert f"tensor {name}: expected shape" in finding.message


def test_an_ignored_pattern_that_is_none_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write(plan(Spec(kind=Kind.TINY, widths=WIDTHS, int4=32)), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["re:*"]
    (folder / "config.json").write_text(json.dumps(config))
    finding = checked(folder)["checkpoint.weights"]
    assert finding.status == Status.FAILURE
    assert "ignore: expected a pattern, got re:*" in finding.message


def test_a_checkpoint_without_tokenizer_is_told(tmp_path: Path) -> None:
    folder = edited(tmp_path / "checkpoint")
    (folder / "tokenizer.json").unlink()
    assert checked(folder)["checkpoint.tokenizer"].status == Status.WARNING


def test_a_name_that_is_not_on_the_machine_is_noted() -> None:
    subject = checks.subject_of("nobody/no-such-checkpoint")
    (result,) = run_checks("checkpoint", checks.CHECKS, subject)
    assert result.status == Status.NOTE
