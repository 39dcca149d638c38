"""Int4 of GPTQ and AutoRound: what of it our kernels read, and that it is compressed-tensors' in other words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qnext_kernels.integers import quantize_int4
from qnext_plugins.model import (
    CheckpointError,
    IntegerWeights,
    as_compressed_tensors,
    check_files,
    expected_shapes,
    from_gptq,
    integer_obstacle,
    stored_names,
)
from qnext_plugins.model.config import Qwen3NextConfig
from qnext_plugins.model.integers import EXPERT_LINEARS
from tests.checkpoints import random_config, store_as_gptq, write_int4_checkpoint

EXPERT = "model.layers.2.mlp.experts.0.up_proj"
MODULES = {"model.layers.0.linear_attn.in_proj_ba", "model.layers.3.self_attn.q_proj", "mtp.fc", EXPERT}

OF_AN_EXPERT = [f"mlp.experts.0.{last}" for last in EXPERT_LINEARS]
NUMBERED = {1: "model.layers.0.linear_attn.in_proj_ba", 2: "mtp.fc", 3: EXPERT}


def gptq(**given: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False} | given


def auto_round(**given: Any) -> dict[str, Any]:
    described = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int"}
    return described | {"packing_format": "auto_round:auto_gptq"} | given


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("described", [gptq, auto_round])
def test_symmetric_groups_are_read(described: Any, group: int) -> None:
    assert integer_obstacle(described(group_size=group)) is None
    assert IntegerWeights(described(group_size=group)).group == group


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        (gptq(bits=8), "num_bits is 8"),
        (gptq(sym=False), "symmetric is False"),
        (gptq(group_size=-1), "group_size is -1"),
        (gptq(desc_act=True), "actorder is group"),
        (gptq(checkpoint_format="marlin"), "checkpoint_format is given"),
        (gptq(lm_head=True), "lm_head is given"),
        (gptq(dynamic={"+:.*layers.1.*": {"bits": 2}}), "dynamic is given"),
        (gptq(dynamic={"+:.*layers.1.*": {"bits": 8, "group_size": 32}}), "dynamic is given"),
        (gptq(dynamic={"+:.*layers.1.*": {"group_size": 32}}), "dynamic is given"),
        (auto_round(packing_format="auto_round:auto_awq"), "packing_format is given"),
        (auto_round(data_type="mx_fp"), "type is mx_fp"),
        (
            auto_round(extra_config={"model.layers.0.self_attn.q_proj": {"bits": 8, "sym": False}}),
            "extra_config is given",
        ),
        ({"quant_method": "awq", "bits": 4}, "quant_method is awq"),
    ],
)
def test_what_else_they_may_be_is_named(described: dict[str, Any], reason: str) -> None:
    assert integer_obstacle(described) == reason
    assert IntegerWeights.of(described) is None


@pytest.mark.parametrize(
    ("described", "left_out"),
    [
        (gptq(), set()),
        (gptq(dynamic={"-:.*in_proj_ba": {}, "-:mtp.*": {}, "+:.*q_proj": {"bits": 4}}), {1, 2}),
        (
            gptq(modules_in_block_to_quantize=[["self_attn.q_proj"], OF_AN_EXPERT]),
            {1, 2},
        ),
        (gptq(modules_in_block_to_quantize=["self_attn.q_proj", "linear_attn.in_proj_ba"]), {2, 3}),
        (auto_round(extra_config={"mtp.fc": {"bits": 16}, "in_proj_ba": {"bits": 16}}), {1, 2}),
        (auto_round(extra_config={"layers.[0-2].linear": {"bits": 16, "data_type": "fp"}}), {1}),
        (auto_round(block_name_to_quantize="model.layers"), {2}),
        (auto_round(block_name_to_quantize=["model.layers.3", "mtp"]), {1, 3}),
    ],
)
def test_what_they_leave_out_is_left_out(described: dict[str, Any], left_out: set[int]) -> None:
    integers = IntegerWeights(described)
    assert {module for module in MODULES if integers.bits(module) is None} == {NUMBERED[n] for n in left_out}


@pytest.mark.parametrize(
    ("described", "in_int8"),
    [
        (gptq(dynamic={"+:.*in_proj_ba": {"bits": 8}, "mtp.*": {"bits": 8}}), {1, 2}),
        (gptq(dynamic={"-:mtp.*": {}, "+:mtp.*": {"bits": 8}}), set()),
        (auto_round(extra_config={"mtp.fc": {"bits": 8}, "in_proj_ba": {"bits": 8, "group_size": 128}}), {1, 2}),
        (auto_round(extra_config={"layers.[0-2].linear": {"bits": 8, "data_type": "int", "sym": True}}), {1}),
    ],
)
def test_what_they_have_in_int8_is_in_int8(described: dict[str, Any], in_int8: set[int]) -> None:
    assert integer_obstacle(described) is None
    integers = IntegerWeights(described)
    assert {module for module in MODULES if integers.bits(module) == 8} == {NUMBERED[n] for n in in_int8}


@pytest.mark.parametrize("described", [gptq(), auto_round()])
def test_what_files_hold_as_it_is_is_left_out_though_nothing_says_so(described: dict[str, Any]) -> None:
    names = [f"{module}.qweight" for module in (NUMBERED[1], EXPERT)]
    names += ["mtp.fc.weight", "model.layers.3.self_attn.q_proj.weight", "model.norm.weight", f"{EXPERT}.scales"]
    integers = IntegerWeights(as_compressed_tensors(described, names))
    assert {module for module in MODULES if integers.bits(module) is not None} == {NUMBERED[1], EXPERT}
    plain = [name.replace("qweight", "weight") for name in names]
    integers = IntegerWeights(as_compressed_tensors(described, plain))
    assert all(integers.bits(module) is None for module in MODULES)


def test_any_other_quantization_stays_as_it_is_described() -> None:
    for described in ({"quant_method": "fp8"}, {}, {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}):
        assert as_compressed_tensors(described) is described


def in_int4(module: str) -> int:
    return 4


def stored(rows: int, columns: int, group: int) -> dict[str, Tensor]:
    words, scale = quantize_int4(torch.randn(rows, columns), group)
    return {
        f"{EXPERT}.qweight": words.t().contiguous(),
        f"{EXPERT}.scales": scale.t().contiguous(),
        f"{EXPERT}.qzeros": torch.full((columns // group, rows // 8), 0x77777777, dtype=torch.int32),
        f"{EXPERT}.g_idx": (torch.arange(columns) // group).int(),
    }


def test_weights_keep_their_numbers_and_what_else_there_is_passes() -> None:
    torch.manual_seed(0)
    words, scale = quantize_int4(torch.randn(16, 96), 32)
    norm = torch.randn(3)
    torch.manual_seed(0)
    passed = dict(from_gptq([*stored(16, 96, 32).items(), ("model.norm.weight", norm)], in_int4))
    assert torch.equal(passed.pop(f"{EXPERT}.weight_packed"), words)
    assert torch.equal(passed.pop(f"{EXPERT}.weight_scale"), scale)
    assert passed.pop(f"{EXPERT}.weight_shape").tolist() == [16, 96]
    assert passed.pop("model.norm.weight") is norm
    assert not passed


def test_zero_points_of_the_second_format_are_the_middle_too() -> None:
    tensors = stored(16, 64, 32)
    tensors[f"{EXPERT}.qzeros"].fill_(-0x77777778)
    assert len(dict(from_gptq(tensors.items(), in_int4))) == 3


def test_other_zero_points_and_columns_in_another_order_are_refused() -> None:
    tensors = stored(16, 64, 32)
    tensors[f"{EXPERT}.qzeros"][1, 1] += 1
    with pytest.raises(CheckpointError, match=rf"tensor {EXPERT}.qzeros: expected zero points of 8"):
        list(from_gptq(tensors.items(), in_int4))
    tensors = stored(16, 64, 32)
    tensors[f"{EXPERT}.g_idx"] = tensors[f"{EXPERT}.g_idx"].flip(0)
    with pytest.raises(
        CheckpointError, match=rf"tensor {EXPERT}.g_idx: expected groups of columns that lie side by side"
    ):
        list(from_gptq(tensors.items(), in_int4))


@pytest.mark.parametrize("told", [True, False], ids=["told by config.json", "told by its files"])
@pytest.mark.parametrize("method", ["gptq", "auto-round"])
def test_a_checkpoint_of_theirs_has_the_tensors_of_compressed_tensors(tmp_path: Path, method: str, told: bool) -> None:
    ignore, in_int8 = ("re:.*self_attn.*", "re:mtp.*"), ("re:.*shared_expert.*", "re:.*in_proj_qkvz")
    write_int4_checkpoint(tmp_path / "int4", tmp_path / "float32", 64, ignore=ignore, in_int8=in_int8)
    folder = store_as_gptq(tmp_path / "int4", tmp_path / method, method, tells=told)
    config = json.loads((folder / "config.json").read_text())
    described, names = config.pop("quantization_config"), () if told else stored_names(str(folder))
    integers = IntegerWeights(as_compressed_tensors(described, names))
    expected = load_file(tmp_path / "int4" / "model.safetensors")
    passed = dict(from_gptq(load_file(folder / "model.safetensors").items(), integers.bits))
    assert passed.keys() == expected.keys()
    assert all(torch.equal(passed[name], tensor) for name, tensor in expected.items())
    shapes = expected_shapes(Qwen3NextConfig.from_hf(type(random_config())(**config)), mtp=True)
    check_files(folder, integers.shapes(shapes))
    if not told:
        with pytest.raises(CheckpointError, match=r"^checkpoint: "):
            check_files(folder, IntegerWeights(described).shapes(shapes))


def test_zero_points_of_int8_are_its_middle() -> None:
    tensor = torch.full((2, 4), 0x7F7F7F7F, dtype=torch.int32)
    assert not list(from_gptq([(f"{EXPERT}.qzeros", tensor)], lambda module: 8))
    with pytest.raises(CheckpointError, match=r"expected zero points of 8,"):
        list(from_gptq([(f"{EXPERT}.qzeros", tensor)], in_int4))
    with pytest.raises(CheckpointError, match=r"expected zero points of 128,"):
        list(from_gptq([(f"{EXPERT}.qzeros", tensor + 1)], lambda module: 8))
