"""What a checkpoint is made of: its widths, its options, its config.json."""

from __future__ import annotations

import enum
import math
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qnext_kernels.integers import INT_GROUPS
from qnext_plugins.model import ConfigError, Qwen3NextConfig

INTERVAL = 4
FP8_BLOCK = 128
MTP_LAYERS = 1


class SpecError(ValueError):
    """What was asked for cannot be made; the message names the option, what was expected and what came."""


class Kind(enum.StrEnum):
    """Which widths a checkpoint has, and whether its continuation is known."""

    TINY = "tiny"
    """Small widths, structured: the greedy continuation is known."""
    SLICE = "slice"
    """The widths of Qwen3-Next-80B-A3B with fewer layers, structured."""
    RANDOM = "random"
    """Small widths and plain random weights."""


class Dtype(enum.StrEnum):
    """What the tensors are stored in, unless they are quantized."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Widths(BaseModel):
    """The numbers of a config.json, under its names."""

    model_config = ConfigDict(frozen=True)

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int = 4
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    intermediate_size: int
    max_position_embeddings: int


# Every width of a linear is a multiple of 128, for --fp8 and --int4; DeltaNet heads as vLLM's own model needs them.
TINY = Widths(
    vocab_size=1024,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    shared_expert_intermediate_size=128,
    intermediate_size=256,
    max_position_embeddings=8192,
)
SLICE = Widths(
    vocab_size=151936,
    hidden_size=2048,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=256,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    num_experts=512,
    num_experts_per_tok=10,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
    intermediate_size=5120,
    max_position_embeddings=262144,
)
WIDTHS = {Kind.TINY: TINY, Kind.SLICE: SLICE, Kind.RANDOM: TINY}
GROUPS = f"{', '.join(map(str, INT_GROUPS[:-1]))} or {INT_GROUPS[-1]}"
OPTIONS = {"num_experts": "experts", "num_experts_per_tok": "experts-per-token"}
"""Options that are not called as their fields are."""


class Spec(BaseModel):
    """All that decides a checkpoint's bytes, except the tokenizer; written beside it."""

    model_config = ConfigDict(frozen=True)

    kind: Kind
    widths: Widths
    seed: int = Field(default=0, ge=0)
    dtype: Dtype = Dtype.BFLOAT16
    mtp: bool = True
    mtp_acceptance: float = 0.7
    """Share of the tokens after which the first draft is right; only of a structured checkpoint with a draft."""
    yarn: float | None = None
    fp8: bool = False
    int4: int | None = None
    """Columns that share a scale; None without int4."""
    int8: bool = False
    """Whether linears but routed experts are in int8, beside these in int4."""

    @property
    def structured(self) -> bool:
        """Whether the greedy continuation is known."""
        return self.kind != Kind.RANDOM

    @property
    def quantized(self) -> bool:
        """Whether linears are stored in another format than the other tensors."""
        return self.fp8 or self.int4 is not None

    def model(self) -> Qwen3NextConfig:
        """The configuration as the model reads it.

        Raises:
            SpecError: it is none that the model serves.
        """
        try:
            return Qwen3NextConfig.from_hf(SimpleNamespace(**self.config(end_token=0)))
        except ConfigError as error:
            raise SpecError(str(error).replace("config.json", "these widths")) from None

    def config(self, end_token: int) -> dict[str, Any]:
        """The config.json, without the quantization; ``end_token`` ends a text."""
        layers = self.widths.num_hidden_layers
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
        config = {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            **self.widths.model_dump(),
            "layer_types": ["full_attention" if (n + 1) % INTERVAL == 0 else "linear_attention" for n in range(layers)],
            "full_attention_interval": INTERVAL,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-6,
            "rope_theta": rope["rope_theta"],
            "partial_rotary_factor": rope["partial_rotary_factor"],
            "rope_scaling": None,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "tie_word_embeddings": False,
            "torch_dtype": self.dtype,
            "use_cache": True,
            "num_nextn_predict_layers": MTP_LAYERS if self.mtp else 0,
            "bos_token_id": end_token,
            "eos_token_id": end_token,
        }
        if self.yarn is not None:
            native = self.widths.max_position_embeddings
            scaling = {"rope_type": "yarn", "factor": self.yarn, "original_max_position_embeddings": native}
            rope |= scaling
            # vLLM and transformers read the scaled length here.
            config |= {"rope_scaling": scaling, "max_position_embeddings": int(native * self.yarn)}
        return config | {"rope_parameters": rope}


def check(spec: Spec) -> None:
    """Raise SpecError unless the checkpoint can be made and engines can read it."""
    widths = spec.widths
    _expect("vocab-size", widths.vocab_size >= 16, "at least 16", widths.vocab_size)
    _expect("layers", widths.num_hidden_layers >= INTERVAL, f"at least {INTERVAL}", widths.num_hidden_layers)
    for name, value in widths.model_dump().items():
        _expect(OPTIONS.get(name, name), value >= 1, "at least 1", value)
    _expect(
        "experts-per-token",
        widths.num_experts_per_tok <= widths.num_experts,
        f"at most the {widths.num_experts} experts",
        widths.num_experts_per_tok,
    )
    _expect("mtp-acceptance", 0 <= spec.mtp_acceptance <= 1, "between 0 and 1", spec.mtp_acceptance)
    if spec.yarn is not None:
        _expect("yarn", 1 < spec.yarn <= 64, "a factor above 1, such as 4.0", spec.yarn)
    if spec.structured:
        needed = smallest_hidden_size(widths.vocab_size)
        _expect(
            "hidden-size",
            widths.hidden_size >= needed,
            f"at least {needed} to tell {widths.vocab_size} tokens apart",
            widths.hidden_size,
        )
    if spec.fp8:
        _expect("dtype", spec.dtype == Dtype.BFLOAT16, "bfloat16 beside --fp8", spec.dtype)
    if spec.int4 is not None:
        _expect("int4", spec.int4 in INT_GROUPS, GROUPS, spec.int4)
        _expect("int4", not spec.fp8, "without --fp8", "both")
        _expect("dtype", spec.dtype == Dtype.BFLOAT16, "bfloat16 beside --int4", spec.dtype)
    _expect("int8", not spec.int8 or spec.int4 is not None, "beside --int4", "it alone")
    spec.model()


def smallest_hidden_size(vocabulary: int) -> int:
    """The width at which the nearest two of so many random codes still have a cosine of about 0.8 at most.

    Of V random codes of width H, the largest cosine of a pair is near 2·√(ln V / H).
    """
    return math.ceil(6.25 * math.log(max(vocabulary, 2))) + 1


def _expect(name: str, holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise SpecError(f"--{name.replace('_', '-')}: expected {expected}, got {got}")
