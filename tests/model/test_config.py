from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from qnext_plugins.model import ConfigError, Qwen3NextConfig

PUBLISHED: dict[str, Any] = {
    "hidden_size": 2048,
    "vocab_size": 151936,
    "num_hidden_layers": 48,
    "full_attention_interval": 4,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
    "intermediate_size": 5120,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
REQUIRED = [
    "hidden_size",
    "vocab_size",
    "num_hidden_layers",
    "rms_norm_eps",
    "num_attention_heads",
    "num_key_value_heads",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
]


def read(**overrides: Any) -> Qwen3NextConfig:
    return Qwen3NextConfig.from_hf(SimpleNamespace(**PUBLISHED | overrides))


def test_published_fields_are_read() -> None:
    config = read()
    assert config.layer_types == ("linear_attention", "linear_attention", "linear_attention", "full_attention") * 12
    assert (config.key_dim, config.value_dim) == (2048, 4096)
    assert all(config.is_sparse(n) for n in range(48))
    assert not config.attention_bias
    assert config.num_nextn_predict_layers == 1


def test_transformers_defaults_are_the_published_sizes() -> None:
    theirs = Qwen3NextConfig.from_hf(transformers.Qwen3NextConfig())
    ours = read(intermediate_size=transformers.Qwen3NextConfig().intermediate_size)
    assert theirs == ours


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("absence", ["null", "missing"])
def test_a_missing_field_is_named(name: str, absence: str) -> None:
    fields = PUBLISHED | {name: None}
    if absence == "missing":
        del fields[name]
    with pytest.raises(ConfigError, match=rf"^config\.json: {name} is missing$"):
        Qwen3NextConfig.from_hf(SimpleNamespace(**fields))


def test_optional_fields_have_defaults() -> None:
    fields = {name: value for name, value in PUBLISHED.items() if name in (*REQUIRED, "full_attention_interval")}
    config = Qwen3NextConfig.from_hf(SimpleNamespace(**fields))
    assert config.head_dim == 2048 // 16
    assert config.norm_topk_prob
    assert not config.tie_word_embeddings
    assert config.mlp_only_layers == ()
    assert config.decoder_sparse_step == 1


def test_layer_types_win_over_the_interval() -> None:
    kinds = ["full_attention", *["linear_attention"] * 47]
    assert read(layer_types=kinds).layer_types == tuple(kinds)


def test_dense_layers_are_those_of_transformers() -> None:
    config = read(mlp_only_layers=[3], decoder_sparse_step=2)
    assert [n for n in range(8) if config.is_sparse(n)] == [1, 5, 7]
    assert not any(read(num_experts=0).is_sparse(n) for n in range(48))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"layer_types": ["linear_attention"] * 47}, "layer_types: expected 48 entries, got 47"),
        ({"layer_types": ["mamba"] + ["linear_attention"] * 47}, r"layer_types: unknown \['mamba'\]"),
        ({"full_attention_interval": None}, "neither layer_types nor full_attention_interval"),
        ({"linear_num_value_heads": 24}, "linear_num_value_heads = 24 is not a multiple of linear_num_key_heads = 16"),
        ({"full_attention_interval": "4"}, "full_attention_interval: expected a whole number from 1 on, got '4'"),
        ({"hidden_size": "2048"}, "hidden_size: expected a whole number from 1 on, got '2048'"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a whole number from 1 on, got 0"),
        ({"num_experts": 512.0}, r"num_experts: expected a whole number from 0 on, got 512\.0"),
        ({"num_experts_per_tok": 513}, "num_experts_per_tok: expected 1 to 512, got 513"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok: expected 1 to 512, got 0"),
    ],
)
def test_a_value_that_is_not_served_is_refused_by_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.json: {message}"):
        read(**overrides)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_sizes_that_divide_the_heads_are_served(size: int) -> None:
    read().check_tensor_parallel(size)


@pytest.mark.parametrize(
    ("overrides", "size", "name"),
    [
        ({}, 3, "num_attention_heads = 16"),
        ({}, 32, "num_attention_heads = 16"),
        ({"linear_num_key_heads": 4}, 8, "linear_num_key_heads = 4"),
        ({"linear_num_key_heads": 4, "linear_num_value_heads": 4}, 8, "linear_num_key_heads = 4"),
        ({"num_key_value_heads": 3}, 2, "num_key_value_heads = 3"),
    ],
)
def test_a_size_that_clashes_with_heads_is_refused_by_name(overrides: dict[str, Any], size: int, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^tensor parallel size {size} .*{name}"):
        read(**overrides).check_tensor_parallel(size)
