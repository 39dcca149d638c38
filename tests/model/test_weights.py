from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qnext_plugins.model import (
    CheckpointError,
    Qwen3NextConfig,
    check_files,
    checked_weights,
    expected_shapes,
    fp8_shapes,
    modules_of,
    stored_names,
)
from tests.model.transformers_models import GROUP_OF_THREE, GROUP_OF_TWO, small_config, small_model

Shapes = dict[str, tuple[int, ...]]
SHAPES: Shapes = {"model.norm.weight": (4,), "lm_head.weight": (6, 4)}
ATTENTION_LAYER = "model.layers.3."


def tensors(shapes: Shapes) -> list[tuple[str, Tensor]]:
    return [(name, torch.zeros(shape)) for name, shape in shapes.items()]


def saved_shapes(overrides: dict[str, Any], path: Path) -> Shapes:
    """Names and shapes in the file that transformers writes."""
    small_model(small_config(**overrides)).save_pretrained(path)
    with safe_open(path / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(GROUP_OF_TWO, id="groups of two"),
        pytest.param(GROUP_OF_THREE, id="groups of three, biases"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"num_experts": 0}, id="dense"),
        pytest.param({"decoder_sparse_step": 2, "mlp_only_layers": []}, id="every second layer dense"),
    ],
)
def test_expected_tensors_are_those_that_transformers_saves(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert expected_shapes(Qwen3NextConfig.from_hf(small_config(**overrides))) == saved_shapes(overrides, tmp_path)


@pytest.mark.parametrize("overrides", [GROUP_OF_TWO, GROUP_OF_THREE])
def test_expected_tensors_of_the_draft_are_an_attention_layer_and_its_joints(
    overrides: dict[str, Any], tmp_path: Path
) -> None:
    saved = saved_shapes(overrides, tmp_path)
    hidden = small_config().hidden_size
    layer = {
        name.replace(ATTENTION_LAYER, "mtp.layers.0."): shape
        for name, shape in saved.items()
        if name.startswith(ATTENTION_LAYER)
    }
    joints: Shapes = {
        "mtp.fc.weight": (hidden, 2 * hidden),
        "mtp.pre_fc_norm_embedding.weight": (hidden,),
        "mtp.pre_fc_norm_hidden.weight": (hidden,),
        "mtp.norm.weight": (hidden,),
    }
    shared = {name: saved[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    config = Qwen3NextConfig.from_hf(small_config(**overrides))
    assert expected_shapes(config, target=False, mtp=True) == layer | joints | shared
    assert expected_shapes(config, target=True, mtp=True) == saved | layer | joints


def test_expected_tensors_pass_in_their_order() -> None:
    given = tensors(SHAPES)
    passed = list(checked_weights(iter(given), SHAPES))
    assert [name for name, _ in passed] == list(SHAPES)
    assert all(ours is theirs for (_, ours), (_, theirs) in zip(passed, given, strict=True))


def test_a_surplus_tensor_is_refused_before_it_is_passed_on() -> None:
    weights = checked_weights([*tensors(SHAPES), ("model.extra", torch.zeros(2, 3)), *tensors(SHAPES)], SHAPES)
    assert [next(weights)[0], next(weights)[0]] == list(SHAPES)
    with pytest.raises(CheckpointError, match=r"^checkpoint: surplus tensor model\.extra \[2, 3\]$"):
        next(weights)


def test_a_misshapen_tensor_is_refused_before_it_is_passed_on() -> None:
    weights = checked_weights(tensors(SHAPES | {"lm_head.weight": (4, 6)}), SHAPES)
    next(weights)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected shape \[6, 4\], got \[4, 6\]$"):
        next(weights)


def test_missing_tensors_are_named_at_the_end() -> None:
    weights = checked_weights(tensors(SHAPES)[:1], SHAPES)
    next(weights)
    with pytest.raises(CheckpointError, match=r"^checkpoint: missing lm_head\.weight$"):
        next(weights)


def test_a_part_of_the_tensors_passes_where_that_may_be() -> None:
    given = tensors(SHAPES)[:1]
    assert list(checked_weights(given, SHAPES, complete=False)) == given


def test_of_many_missing_tensors_eight_are_named_and_the_rest_counted() -> None:
    shapes: Shapes = {f"t{n:02}": (1,) for n in range(11)}
    with pytest.raises(
        CheckpointError, match=r"^checkpoint: missing t00, t01, t02, t03, t04, t05, t06, t07 and 3 more$"
    ):
        list(checked_weights([], shapes))


def test_tensors_of_passing_prefixes_and_rotary_frequencies_are_dropped() -> None:
    surplus: Shapes = {"mtp.fc.weight": (1,), "model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}
    passed = checked_weights(tensors(surplus | SHAPES), SHAPES, passing=("mtp.",))
    assert [name for name, _ in passed] == list(SHAPES)
    with pytest.raises(CheckpointError, match=r"surplus tensor mtp\.fc\.weight"):
        list(checked_weights(tensors(surplus | SHAPES), SHAPES))


def test_tensors_are_drawn_one_by_one() -> None:
    drawn: list[str] = []

    def source() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors(SHAPES):
            drawn.append(name)
            yield name, tensor

    next(checked_weights(source(), SHAPES))
    assert drawn == list(SHAPES)[:1]


def test_in_block_wise_fp8_scales_lie_beside_the_linears_that_are_not_left_out() -> None:
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (50, 300),
        "lm_head.weight": (50, 300),
        "mtp.fc.weight": (300, 600),
        f"{layer}.linear_attn.in_proj_ba.weight": (8, 300),
        f"{layer}.linear_attn.out_proj.weight": (300, 128),
        f"{layer}.linear_attn.conv1d.weight": (8, 1, 4),
        f"{layer}.linear_attn.A_log": (4,),
        f"{layer}.mlp.gate.weight": (4, 300),
        f"{layer}.mlp.shared_expert_gate.weight": (1, 300),
        f"{layer}.mlp.experts.0.up_proj.weight": (256, 300),
        "model.layers.1.mlp.experts.0.up_proj.weight": (256, 300),
        "model.layers.2.mlp.experts.0.up_proj.weight": (256, 300),
    }
    left_out = ["mtp.fc", f"{layer}.linear_attn.in_proj_ba", "model.layers.1.mlp.experts"]
    left_out.append("model.layers.2.mlp.experts.3.up_proj")
    assert fp8_shapes(shapes, left_out) == shapes | {
        f"{layer}.linear_attn.out_proj.weight_scale_inv": (3, 1),
        f"{layer}.mlp.experts.0.up_proj.weight_scale_inv": (2, 3),
    }


def test_all_experts_of_a_layer_are_one_module() -> None:
    names = ["lm_head.weight", "a.mlp.gate.weight", *(f"a.mlp.experts.{e}.up_proj.weight" for e in range(3))]
    assert modules_of(names) == {"lm_head", "a.mlp.gate", "a.mlp.experts"}


def test_headers_of_the_files_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "mtp.x": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    check_files(tmp_path, {"a": (2, 3), "b": (4,)}, passing=("mtp.",))
    for shapes, named in (
        ({"a": (2, 3)}, "surplus tensor b"),
        ({"a": (3, 2), "b": (4,)}, r"tensor a: expected shape \[3, 2\], got \[2, 3\]"),
        ({"a": (2, 3), "b": (4,), "c": (1,)}, "missing c"),
    ):
        with pytest.raises(CheckpointError, match=named):
            check_files(tmp_path, shapes, passing=("mtp.",))
    check_files(tmp_path / "hub-name", {"a": (1,)})


@pytest.mark.parametrize("content", [b"no header", b"\x00" * 100])
def test_a_file_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model-00002.safetensors").write_bytes(content)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"^checkpoint: \S+/model-00002\.safetensors cannot be read: "):
        check_files(tmp_path, {"a": (1,)})


@pytest.mark.parametrize("content", ['{"weight_map": 3}', "{}", "[]", '{"weight_map": ', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: expected a weight_map"):
        check_files(tmp_path, {"a": (1,)})


def test_names_are_those_of_the_index_or_of_the_only_file(tmp_path: Path) -> None:
    assert stored_names(str(tmp_path)) == stored_names("neither a folder nor a name") == set()
    save_file({"a.weight": torch.zeros(2), "b.qweight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert stored_names(str(tmp_path)) == {"a.weight", "b.qweight"}
    index = {"weight_map": {"c.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert stored_names(str(tmp_path)) == {"c.weight"}
