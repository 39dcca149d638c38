"""The fields of a Qwen3-Next ``config.json`` that the model reads, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LINEAR_ATTENTION = "linear_attention"
FULL_ATTENTION = "full_attention"
MAY_BE_ZERO = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "intermediate_size",
    "num_nextn_predict_layers",
)


class ConfigError(ValueError):
    """A checkpoint's configuration lacks a field or holds a value that the model does not serve."""


class CheckpointError(ValueError):
    """A checkpoint has missing, surplus or misshapen tensors, or a file that cannot be read."""


@dataclass(frozen=True)
class Qwen3NextConfig:
    """Names are those of transformers' ``Qwen3NextConfig``; sizes are whole-model, not one rank's."""

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    rms_norm_eps: float

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    attention_bias: bool

    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool
    intermediate_size: int
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]

    num_nextn_predict_layers: int
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, hf_config: Any) -> Qwen3NextConfig:
        """Read transformers' configuration object of a Qwen3-Next checkpoint.

        Raises:
            ConfigError: a field is missing or has a value that is not served.
        """

        def field(name: str, *default: Any) -> Any:
            value = getattr(hf_config, name, None)
            if value is None:
                if not default:
                    raise ConfigError(f"config.json: {name} is missing")
                return default[0]
            if cls.__annotations__.get(name) == "int":
                _check_number(name, value, 0 if name in MAY_BE_ZERO else 1)
            return value

        num_layers, heads = field("num_hidden_layers"), field("num_attention_heads")
        config = cls(
            hidden_size=field("hidden_size"),
            vocab_size=field("vocab_size"),
            num_hidden_layers=num_layers,
            layer_types=tuple(field("layer_types", None) or _interval_layer_types(hf_config, num_layers)),
            rms_norm_eps=field("rms_norm_eps"),
            num_attention_heads=heads,
            num_key_value_heads=field("num_key_value_heads"),
            head_dim=field("head_dim", field("hidden_size") // heads),
            attention_bias=field("attention_bias", False),
            linear_num_key_heads=field("linear_num_key_heads"),
            linear_num_value_heads=field("linear_num_value_heads"),
            linear_key_head_dim=field("linear_key_head_dim"),
            linear_value_head_dim=field("linear_value_head_dim"),
            linear_conv_kernel_dim=field("linear_conv_kernel_dim"),
            num_experts=field("num_experts"),
            num_experts_per_tok=field("num_experts_per_tok"),
            moe_intermediate_size=field("moe_intermediate_size"),
            shared_expert_intermediate_size=field("shared_expert_intermediate_size"),
            norm_topk_prob=field("norm_topk_prob", True),
            intermediate_size=field("intermediate_size", 0),
            decoder_sparse_step=field("decoder_sparse_step", 1),
            mlp_only_layers=tuple(field("mlp_only_layers", ())),
            num_nextn_predict_layers=field("num_nextn_predict_layers", 1),
            tie_word_embeddings=field("tie_word_embeddings", False),
        )
        config._check(field("hidden_act", "silu"))
        return config

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` has experts (else a plain MLP), as transformers decides it."""
        sparse_step = self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        return layer not in self.mlp_only_layers and sparse_step

    @property
    def key_dim(self) -> int:
        """Width of the DeltaNet's queries, and of its keys."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of the DeltaNet's values."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    def check_tensor_parallel(self, size: int) -> None:
        """Raise ConfigError unless every head count can be split over ``size`` ranks."""
        for name in ("num_attention_heads", "linear_num_key_heads", "linear_num_value_heads"):
            if getattr(self, name) % size:
                raise ConfigError(f"tensor parallel size {size} does not divide {name} = {getattr(self, name)}")
        if self.num_key_value_heads % size and size % self.num_key_value_heads:
            raise ConfigError(f"tensor parallel size {size} and num_key_value_heads = {self.num_key_value_heads} clash")

    def _check(self, hidden_act: str) -> None:
        if hidden_act != "silu":
            raise ConfigError(f"config.json: hidden_act: expected 'silu', got {hidden_act!r}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ConfigError(
                f"config.json: layer_types: expected {self.num_hidden_layers} entries, got {len(self.layer_types)}"
            )
        unknown = set(self.layer_types) - {LINEAR_ATTENTION, FULL_ATTENTION}
        if unknown:
            raise ConfigError(f"config.json: layer_types: unknown {sorted(unknown)}")
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ConfigError(
                f"config.json: linear_num_value_heads = {self.linear_num_value_heads} is not a multiple of "
                f"linear_num_key_heads = {self.linear_num_key_heads}"
            )
        if not self.intermediate_size and not all(map(self.is_sparse, range(self.num_hidden_layers))):
            raise ConfigError("config.json: intermediate_size is missing, and some layers have no experts")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"config.json: num_experts_per_tok: expected 1 to {self.num_experts}, got {self.num_experts_per_tok}"
            )


def _check_number(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ConfigError(f"config.json: {name}: expected a whole number from {least} on, got {value!r}")


def _interval_layer_types(hf_config: Any, num_layers: int) -> list[str]:
    interval = getattr(hf_config, "full_attention_interval", None)
    if not interval:
        raise ConfigError("config.json: neither layer_types nor full_attention_interval is there")
    _check_number("full_attention_interval", interval, 1)
    return [FULL_ATTENTION if (layer + 1) % interval == 0 else LINEAR_ATTENTION for layer in range(num_layers)]
