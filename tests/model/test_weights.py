from __future__ import annotations

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
    int4_group,
    int4_obstacle,
    int4_shapes,
    left_out_of_int4,
    modules_of,
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


def test_in_int4_three_tensors_take_the_place_of_the_weights_that_are_not_left_out() -> None:
    layer = "model.layers.0"
    kept = {
        "model.embed_tokens.weight": (50, 256),
        "lm_head.weight": (50, 256),
        "mtp.fc.weight": (256, 512),
        f"{layer}.linear_attn.conv1d.weight": (8, 1, 4),
        f"{layer}.self_attn.q_norm.weight": (64,),
        f"{layer}.self_attn.q_proj.bias": (96,),
        f"{layer}.mlp.gate.weight": (4, 256),
        f"{layer}.mlp.shared_expert_gate.weight": (1, 256),
        "model.layers.1.mlp.experts.0.up_proj.weight": (256, 256),
    }
    linears = {f"{layer}.self_attn.q_proj": (96, 256), f"{layer}.mlp.experts.0.down_proj": (256, 128)}
    shapes = kept | {f"{name}.weight": shape for name, shape in linears.items()}
    assert int4_shapes(shapes, ["mtp.fc", "model.layers.1.mlp.experts"], 64) == kept | {
        f"{layer}.self_attn.q_proj.weight_packed": (96, 32),
        f"{layer}.self_attn.q_proj.weight_scale": (96, 4),
        f"{layer}.self_attn.q_proj.weight_shape": (2,),
        f"{layer}.mlp.experts.0.down_proj.weight_packed": (256, 16),
        f"{layer}.mlp.experts.0.down_proj.weight_scale": (256, 2),
        f"{layer}.mlp.experts.0.down_proj.weight_shape": (2,),
    }


def int4_described(
    weights: dict[str, Any] | None = None, scheme: dict[str, Any] | None = None, **beside: Any
) -> dict[str, Any]:
    """A ``quantization_config`` in int4 with other fields of its weights, of its group, or beside that."""
    numbers = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    group = {"targets": ["Linear"], "weights": numbers | {"actorder": None} | (weights or {})} | (scheme or {})
    whole = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    return whole | {"ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {}} | beside


@pytest.mark.parametrize(
    ("quantization", "told"),
    [
        (int4_described(), 32),
        (int4_described({"group_size": 64, "actorder": "static"}), 64),
        (int4_described({"group_size": 128, "actorder": "weight"}, {"format": "pack-quantized"}), 128),
        (int4_described({"actorder": False, "observer": "mse", "scale_dtype": None}), 32),
        (int4_described({"actorder": "group"}), "actorder is group"),
        (int4_described({"actorder": True}), "actorder is True"),
        (int4_described({"group_size": 16}), "group_size is 16"),
        (int4_described({"group_size": None, "strategy": "channel"}), "strategy is channel"),
        (int4_described({"num_bits": 8}), "num_bits is 8"),
        (int4_described({"type": "float"}), "type is float"),
        (int4_described({"symmetric": False}), "symmetric is False"),
        (int4_described({"dynamic": True}), "dynamic is True"),
        (int4_described(scheme={"targets": ["re:.*experts.*"]}), "targets is ['re:.*experts.*']"),
        (int4_described(scheme={"targets": ["Linear", "Embedding"]}), "targets is ['Linear', 'Embedding']"),
        (int4_described(scheme={"input_activations": {"num_bits": 8}}), "input_activations is given"),
        (int4_described(scheme={"output_activations": {"num_bits": 8}}), "output_activations is given"),
        (int4_described(scheme={"format": "marlin-24"}), "format is marlin-24"),
        (int4_described(scheme={"weights": None}), "weights are not described"),
        (int4_described(format="int-quantized"), "format is int-quantized"),
        (int4_described(quant_method="awq"), "quant_method is awq"),
        (int4_described(config_groups={}), "there are 0 config_groups, not one"),
        (int4_described(config_groups={"W4A16": ["Linear"]}), "weights are not described"),
        (
            int4_described(config_groups={name: int4_described()["config_groups"]["group_0"] for name in "ab"}),
            "there are 2 config_groups, not one",
        ),
        (int4_described(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is given"),
        (int4_described(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is given"),
        (int4_described(transform_config={"config_groups": {"u": {}}}), "transform_config is given"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quant_method is fp8"),
        ({}, "quant_method is None"),
        (None, "quant_method is None"),
    ],
)
def test_int4_that_is_read_is_told_by_its_group(quantization: dict[str, Any] | None, told: int | str) -> None:
    assert int4_group(quantization) == (told if isinstance(told, int) else None)
    assert int4_obstacle(quantization) == (told if isinstance(told, str) else None)


LAYER = "model.layers.1"
MODULES = ["lm_head", *(f"{LAYER}.{name}" for name in ("mlp.gate", "mlp.experts", "mlp.shared_expert.up_proj"))]
MODULES += [f"{LAYER}.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "model.layers.2.mlp.experts", "mtp.fc"]


@pytest.mark.parametrize(
    ("entry", "covered"),
    [
        ("lm_head", ["lm_head"]),
        (f"{LAYER}.self_attn.q_proj", [f"{LAYER}.self_attn.q_proj"]),
        ("re:.*lm_head", ["lm_head"]),
        ("re:mtp", ["mtp.fc"]),
        ("re:fc", []),
        (r"re:model\.layers\.1\..*q_proj$", [f"{LAYER}.self_attn.q_proj"]),
        ("re:.*mlp.gate$", [f"{LAYER}.mlp.gate"]),
        (r"re:.*mlp\.shared_expert$", []),
        (f"{LAYER}.mlp.shared_expert", []),
        ("re:.*mlp.experts.*", [f"{LAYER}.mlp.experts", "model.layers.2.mlp.experts"]),
        (r"re:.*\.1\.mlp\.experts\.\d+\.down_proj$", [f"{LAYER}.mlp.experts"]),
        (f"{LAYER}.mlp.experts.3.up_proj", [f"{LAYER}.mlp.experts"]),
        (f"{LAYER}.mlp.experts.3", []),
        ("Linear", []),
    ],
)
def test_ignored_are_linears_by_their_name_and_experts_by_one_of_theirs(entry: str, covered: list[str]) -> None:
    assert left_out_of_int4(int4_described(ignore=[entry]), MODULES) == set(covered)
    one_by_one = [name for name in MODULES if not name.endswith("experts")]
    one_by_one += [
        f"model.layers.{n}.mlp.experts.{e}.{last}_proj"
        for n in (1, 2)
        for e in range(4)
        for last in ("gate", "up", "down")
    ]
    assert left_out_of_int4(int4_described(ignore=["a", entry, "re:b"]), one_by_one) == set(covered)


def test_nothing_is_left_out_where_nothing_is_ignored() -> None:
    assert left_out_of_int4(int4_described(ignore=None), MODULES) == set()


def test_an_ignored_pattern_that_is_none_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"^config\.json: ignore: expected a pattern, got re:\*experts "):
        left_out_of_int4(int4_described(ignore=["re:*experts"]), MODULES)


def test_ignored_is_what_vllm_ignores() -> None:
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.compressed_tensors.utils", reason="needs vLLM")
    linears = [name for name in MODULES if not name.endswith("experts")]
    for entry in ("lm_head", "re:.*lm_head", "re:fc", "re:.*mlp.gate", r"re:.*mlp\.shared_expert$", "re:.*layers.1.*"):
        theirs = {name for name in linears if utils.should_ignore_layer(name, [entry])}
        assert left_out_of_int4(int4_described(ignore=[entry]), linears) == theirs, entry


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
