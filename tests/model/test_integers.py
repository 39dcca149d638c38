"""Weights in group-wise integers: which of them our kernels read, and what a checkpoint says of each linear."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from qnext_plugins.model import CheckpointError, IntegerWeights, integer_obstacle


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
    ignore = ["mtp.fc", "re:.*layers.1.mlp.experts.*"]
    assert IntegerWeights(described({"group_size": 64}, ignore=ignore)).shapes(shapes) == kept | {
        f"{layer}.self_attn.q_proj.weight_packed": (96, 32),
        f"{layer}.self_attn.q_proj.weight_scale": (96, 4),
        f"{layer}.self_attn.q_proj.weight_shape": (2,),
        f"{layer}.mlp.experts.0.down_proj.weight_packed": (256, 16),
        f"{layer}.mlp.experts.0.down_proj.weight_scale": (256, 2),
        f"{layer}.mlp.experts.0.down_proj.weight_shape": (2,),
    }


def described(
    weights: dict[str, Any] | None = None, scheme: dict[str, Any] | None = None, **beside: Any
) -> dict[str, Any]:
    """A ``quantization_config`` in int4 with other fields of its weights, of its group, or beside that."""
    numbers = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    group = {"targets": ["Linear"], "weights": numbers | {"actorder": None} | (weights or {})} | (scheme or {})
    whole = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    return whole | {"ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {}} | beside


def mixed(weights: dict[str, Any], **beside: Any) -> dict[str, Any]:
    """Int4, and for attention and shared experts other weights."""
    whole = described(**beside)
    targets = ["re:.*self_attn.*", "re:.*shared_expert.*", "mtp.fc"]
    (other,) = described(weights, {"targets": targets})["config_groups"].values()
    # In this order: the more general entry does not hide the other.
    return whole | {"config_groups": {"group_0": whole["config_groups"]["group_0"], "group_1": other}}


@pytest.mark.parametrize(
    ("quantization", "told"),
    [
        (described(), 32),
        (described({"group_size": 64, "actorder": "static"}), 64),
        (described({"group_size": 128, "actorder": "weight"}, {"format": "pack-quantized"}), 128),
        (described({"actorder": False, "observer": "mse", "scale_dtype": None}), 32),
        (described({"actorder": "group"}), "actorder is group"),
        (described({"actorder": True}), "actorder is True"),
        (described({"group_size": 16}), "group_size is 16"),
        (described({"group_size": None, "strategy": "channel"}), "strategy is channel"),
        (described({"num_bits": 8}), "num_bits is 8"),
        (described({"type": "float"}), "type is float"),
        (described({"symmetric": False}), "symmetric is False"),
        (described({"dynamic": True}), "dynamic is True"),
        (described(scheme={"targets": ["re:.*experts.*"]}), 32),
        (described({"num_bits": 8}, scheme={"targets": ["re:.*experts.*"]}), 32),
        (described({"num_bits": 2}, scheme={"targets": ["re:.*experts.*"]}), "num_bits is 2"),
        (described(scheme={"targets": []}), "targets are not given"),
        (described(scheme={"targets": ["Linear", "Embedding"]}), "targets is ['Linear', 'Embedding']"),
        (described(scheme={"input_activations": {"num_bits": 8}}), "input_activations is given"),
        (described(scheme={"output_activations": {"num_bits": 8}}), "output_activations is given"),
        (described(scheme={"format": "marlin-24"}), "format is marlin-24"),
        (described(scheme={"weights": None}), "weights are not described"),
        (described(format="int-quantized"), "format is int-quantized"),
        (described(quant_method="awq"), "quant_method is awq"),
        (described(config_groups={}), "there are no config_groups"),
        (described(config_groups={"W4A16": ["Linear"]}), "weights are not described"),
        (mixed({"num_bits": 8}), 32),
        (mixed({"num_bits": 8, "group_size": 128}), "group_size is 32 and 128"),
        (mixed({"num_bits": 8, "symmetric": False}), "symmetric is False"),
        (described(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is given"),
        (described(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is given"),
        (described(transform_config={"config_groups": {"u": {}}}), "transform_config is given"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quant_method is fp8"),
        ({}, "quant_method is None"),
        (None, "quant_method is None"),
    ],
)
def test_integers_that_are_read_are_told_by_their_group(quantization: dict[str, Any] | None, told: int | str) -> None:
    assert integer_obstacle(quantization) == (told if isinstance(told, str) else None)
    integers = IntegerWeights.of(quantization)
    assert (None if integers is None else integers.group) == (told if isinstance(told, int) else None)


LAYER = "model.layers.1"
MODULES = ["lm_head", *(f"{LAYER}.{name}" for name in ("mlp.gate", "mlp.experts", "mlp.shared_expert.up_proj"))]
MODULES += [f"{LAYER}.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "model.layers.2.mlp.experts", "mtp.fc"]


def left_out(quantization: dict[str, Any], modules: Iterable[str]) -> set[str]:
    integers = IntegerWeights(quantization)
    return {module for module in modules if integers.bits(module) is None}


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
    assert left_out(described(ignore=[entry]), MODULES) == set(covered)
    one_by_one = [name for name in MODULES if not name.endswith("experts")]
    one_by_one += [
        f"model.layers.{n}.mlp.experts.{e}.{last}_proj"
        for n in (1, 2)
        for e in range(4)
        for last in ("gate", "up", "down")
    ]
    assert {
        name.partition(".experts.")[0] + ".experts" if ".experts." in name else name
        for name in left_out(described(ignore=["a", entry, "re:b"]), one_by_one)
    } == set(covered)


def test_nothing_is_left_out_where_nothing_is_ignored() -> None:
    assert left_out(described(ignore=None), MODULES) == set()


def test_an_ignored_pattern_that_is_none_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"^config\.json: ignore: expected a pattern, got re:\*experts "):
        IntegerWeights(described(ignore=["re:*experts"])).bits("lm_head")


def test_ignored_is_what_vllm_ignores() -> None:
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.compressed_tensors.utils", reason="needs vLLM")
    linears = [name for name in MODULES if not name.endswith("experts")]
    for entry in ("lm_head", "re:.*lm_head", "re:fc", "re:.*mlp.gate", r"re:.*mlp\.shared_expert$", "re:.*layers.1.*"):
        theirs = {name for name in linears if utils.should_ignore_layer(name, [entry])}
        assert left_out(described(ignore=[entry]), linears) == theirs, entry


def test_bits_are_those_of_the_targets_that_name_a_linear_and_ignored_ones_have_none() -> None:
    integers = IntegerWeights(mixed({"num_bits": 8}, ignore=["re:.*layers.2.self_attn.*", "lm_head"]))
    assert {module: integers.bits(module) for module in [*MODULES, f"{LAYER}.linear_attn.in_proj_ba"]} == {
        "lm_head": None,
        f"{LAYER}.mlp.gate": 4,
        f"{LAYER}.mlp.experts": 4,
        f"{LAYER}.mlp.shared_expert.up_proj": 8,
        f"{LAYER}.self_attn.q_proj": 8,
        "model.layers.11.self_attn.q_proj": 8,
        "model.layers.2.mlp.experts": 4,
        "mtp.fc": 8,
        f"{LAYER}.linear_attn.in_proj_ba": 4,
    }
    assert integers.bits("model.layers.2.self_attn.q_proj") is None
    name = f"{LAYER}.self_attn.q_proj"
    assert integers.shapes({f"{name}.weight": (96, 256)}) == {
        f"{name}.weight_packed": (96, 64),
        f"{name}.weight_scale": (96, 8),
        f"{name}.weight_shape": (2,),
    }


def test_what_no_target_names_is_left_out() -> None:
    assert left_out(described(scheme={"targets": ["re:.*experts.*"]}), MODULES) == {
        module for module in MODULES if not module.endswith(".experts")
    }


def test_linears_that_are_merged_have_as_many_bits_each() -> None:
    parts = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    integers = IntegerWeights(mixed({"num_bits": 8}, ignore=["re:.*layers.2.self_attn.v_proj"]))
    assert integers.bits_of_merged(f"{LAYER}.self_attn.qkv_proj", parts) == 8
    assert integers.bits_of_merged(f"{LAYER}.linear_attn.in_proj_qkvz", parts) == 4
    with pytest.raises(ValueError, match=r"self_attn\.qkv_proj: expected as many bits .*v_proj not quan"):
        integers.bits_of_merged("model.layers.2.self_attn.qkv_proj", parts)


def test_linears_of_an_expert_that_differ_are_named() -> None:
    scheme = {"targets": ["re:.*experts.*up_proj"]}
    with pytest.raises(CheckpointError, match=r"^config\.json: targets: expected model.layers.1.mlp.experts.0.g"):
        IntegerWeights(described(scheme=scheme)).bits(f"{LAYER}.mlp.experts")
