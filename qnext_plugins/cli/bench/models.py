"""Layer slices of the two models that the release compares: their configurations, and the work of their full depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

BF16_BYTES = 2


@dataclass(frozen=True)
class Slice:
    """Some layers of Qwen3-Next-80B-A3B at their real widths, with fewer experts."""

    layers: int = 4
    experts: int = 256
    vocabulary: int = 151936
    hidden: int = 2048
    intermediate: int = 512
    fp8: bool = False
    """Whether linears and experts are in block-wise FP8, as in the published checkpoint."""
    int4: int | None = None
    """Columns that share a scale where linears and experts are in int4."""
    int8: bool = False
    """Whether linears but routed experts are in int8, beside these in int4."""

    def config(self) -> dict[str, Any]:
        """What ``config.json`` says."""
        quantized = {"quantization_config": self._quantization()} if self.fp8 or self.int4 else {}
        return quantized | {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": 5120,
            "num_hidden_layers": self.layers,
            "full_attention_interval": 4,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "attention_bias": False,
            "partial_rotary_factor": 0.25,
            "rope_theta": 10_000_000.0,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "num_experts": self.experts,
            "num_experts_per_tok": 10,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": self.intermediate,
            "shared_expert_intermediate_size": self.intermediate,
            "max_position_embeddings": 262144,
            "tie_word_embeddings": False,
            "eos_token_id": 0,
        }

    def _quantization(self) -> dict[str, Any]:
        # Here, since llama.cpp's environment, where this module is imported too, has neither PyTorch nor pydantic.
        from qnext_plugins.cli.checkpoint.tensors import ALL_BUT_EXPERTS, describe_fp8, describe_int4

        modules = ("linear_attn.in_proj_ba", "linear_attn.conv1d", "mlp.gate", "mlp.shared_expert_gate")
        left_out = ["lm_head", *(f"model.layers.{n}.{module}" for n in range(self.layers) for module in modules)]
        if self.int4:
            return describe_int4(left_out, self.int4, ALL_BUT_EXPERTS if self.int8 else ())
        return describe_fp8(left_out)

    def expert_bytes(self) -> float:
        """Of an element of a routed expert, its part of a scale in int4 included."""
        if self.int4:
            return 0.5 + BF16_BYTES / self.int4
        return 1 if self.fp8 else BF16_BYTES

    def linear_bytes(self) -> float:
        """Of an element of a linear or the shared expert."""
        return self.expert_bytes() + (0.5 if self.int8 else 0)

    def cache_bytes(self, context: int) -> int:
        """Of keys, values and states of one sequence in the slice, with room for the engine's paging."""
        full = self.layers // 4
        return 2 * (full * context * 2 * 2 * 256 * BF16_BYTES + (self.layers - full) * 4 * (32 * 128 * 128 * 4))


@dataclass(frozen=True)
class SliceWork:
    """What a step of a slice must move and compute, from the sizes of its layers."""

    model: Slice

    def weights(self, tokens: int) -> float:
        """Bytes of the weights that ``tokens`` tokens of a step read, every expert at most once; with head."""
        chosen = self.model.experts * (1 - (1 - 10 / self.model.experts) ** tokens)
        routed = self.model.layers * chosen * self._expert()
        others = self._linears() + self.model.layers * self._expert()
        plain = self._small() + self._head()
        return self.model.expert_bytes() * routed + self.model.linear_bytes() * others + BF16_BYTES * plain

    def decode(self, context: int, tokens: int = 1, batch: int = 1) -> float:
        """Bytes of a step of ``tokens`` tokens for each of ``batch`` sequences.

        Weights; of each sequence its states (one read, one written a token), keys and values.
        """
        full = self.model.layers // 4
        state = (self.model.layers - full) * 32 * 128 * 128 * 4
        keys = full * context * 2 * 2 * 256 * BF16_BYTES
        return self.weights(batch * tokens) + batch * ((1 + tokens) * state + keys)

    def flops(self, tokens: int, context: int) -> float:
        """FLOP of ``tokens`` tokens of a sequence that end at ``context``; one of them goes through the head."""
        full = self.model.layers // 4
        dense = self._linears() + self._small()
        matrices = 2 * tokens * (dense + self.model.layers * 11 * self._expert()) + 2 * self._head()
        scores = tokens * (context - tokens / 2)
        return matrices + full * 4 * 16 * 256 * scores + (self.model.layers - full) * tokens * 32 * 7 * 128**2

    def _linears(self) -> float:
        """Parameters around the mixers of all layers, those that may be quantized."""
        full = self.model.layers // 4
        return self.model.hidden * ((self.model.layers - full) * (12288 + 4096) + full * (8192 + 1024 + 4096))

    def _small(self) -> float:
        """Of the projections of gates, and of the routers."""
        full = self.model.layers // 4
        return self.model.hidden * ((self.model.layers - full) * 64 + self.model.layers * (self.model.experts + 1))

    def _expert(self) -> float:
        return 3 * self.model.hidden * self.model.intermediate

    def _head(self) -> float:
        return self.model.vocabulary * self.model.hidden


@dataclass(frozen=True)
class DenseSlice:
    """Some layers of Qwen3-32B at their real widths."""

    layers: int = 1
    vocabulary: int = 151936

    def config(self) -> dict[str, Any]:
        """What ``config.json`` says."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocabulary,
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_hidden_layers": self.layers,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": False,
            "rope_theta": 1_000_000.0,
            # 40960 as published; more is asked of it here.
            "max_position_embeddings": 262144,
            "tie_word_embeddings": False,
            "eos_token_id": 0,
        }

    def cache_bytes(self, context: int) -> int:
        """Of keys and values of one sequence in the slice, with room for the engine's paging."""
        return 2 * self.layers * context * 2 * 8 * 128 * BF16_BYTES


class Work(Protocol):
    """What a model must compute and move at its full depth, one sequence at a time or several."""

    @property
    def name(self) -> str: ...

    @property
    def depth(self) -> int:
        """Layers."""

    def prefill_flops(self, tokens: int) -> float:
        """FLOP of a prompt."""

    def decode_bytes(self, context: int, batch: int) -> float:
        """Bytes that a step of one token for each of ``batch`` sequences reads and writes."""


@dataclass(frozen=True)
class QwenNext:
    """Qwen3-Next-80B-A3B."""

    name: str = "Qwen3-Next-80B-A3B"
    depth: int = 48
    experts: int = 512
    vocabulary: int = 151936

    def prefill_flops(self, tokens: int) -> float:
        active = self._dense() + self.depth * 11 * self._expert()
        attention = 12 * 4 * 16 * 256 * tokens**2 / 2
        return 2 * tokens * active + 2 * self._head() + attention + 36 * tokens * 32 * 7 * 128**2

    def decode_bytes(self, context: int, batch: int) -> float:
        chosen = self.experts * (1 - (1 - 10 / self.experts) ** batch)
        weights = self._dense() + self.depth * (chosen + 1) * self._expert() + self._head()
        states, keys = 36 * 2 * 32 * 128 * 128 * 4, 12 * context * 2 * 2 * 256 * BF16_BYTES
        return BF16_BYTES * weights + batch * (states + keys)

    def _dense(self) -> float:
        """Parameters of all layers without their experts."""
        linear, attention = 2048 * (12288 + 64 + 4096), 2048 * (8192 + 1024 + 4096)
        return 36 * linear + 12 * attention + self.depth * 2048 * (self.experts + 1)

    def _expert(self) -> float:
        return 3 * 2048 * 512

    def _head(self) -> float:
        return self.vocabulary * 2048


@dataclass(frozen=True)
class Qwen32B:
    """Qwen3-32B."""

    name: str = "Qwen3-32B"
    depth: int = 64
    vocabulary: int = 151936

    def prefill_flops(self, tokens: int) -> float:
        attention = self.depth * 4 * 64 * 128 * tokens**2 / 2
        return 2 * tokens * self.depth * self._layer() + 2 * self.vocabulary * 5120 + attention

    def decode_bytes(self, context: int, batch: int) -> float:
        weights = self.depth * self._layer() + self.vocabulary * 5120
        return BF16_BYTES * weights + batch * self.depth * context * 2 * 8 * 128 * BF16_BYTES

    def _layer(self) -> float:
        return 5120 * (2 * 8192 + 2 * 1024) + 3 * 5120 * 25600
