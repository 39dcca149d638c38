"""A GGUF file of Qwen3-Next layers, as llama.cpp's ``convert_hf_to_gguf.py --outtype bf16`` writes it of a checkpoint.

Linears and experts may be in blocks of 32 columns instead, Q8_0 or Q4_0. Runs in llama.cpp's environment: needs NumPy
and gguf alone. bfloat16 arrays are their bits in uint16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Source = Callable[[str, tuple[int, ...]], NDArray[np.uint16]]
"""Gives the tensor of a checkpoint with this name and shape, bfloat16."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: type[np.uint16] | type[np.float32]
    """uint16 holds bfloat16."""
    read: Callable[[Source], NDArray]
    """Makes it of tensors of the checkpoint."""
    quantized: bool = False
    """Whether it is in another type where the file's linears and experts are."""


def random_weights(seed: int = 0) -> Source:
    """Weights of random sign with magnitudes between 2^-11 and 2^-7."""
    rng = np.random.default_rng(seed)

    def draw(_: str, shape: tuple[int, ...]) -> NDArray[np.uint16]:
        bits = rng.integers(1 << 16, size=shape, dtype=np.uint16)
        # Sign, mantissa and the exponent's last two bits stay random.
        bits &= 0x81FF
        bits |= 0x3A00
        return bits

    return draw


def write(path: Path, config: dict[str, Any], source: Source, stored: str = "BF16") -> None:
    """Write the model of ``config``, a ``config.json`` without dense layers, draft layer and RoPE scaling.

    ``stored`` is the type of linears and experts: BF16, Q8_0 or Q4_0.
    """
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3NEXT])
    _add_metadata(writer, config, stored)
    tensors = list(_Layout(config).tensors())
    kinds = {}
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType.BF16 if tensor.dtype is np.uint16 else gguf.GGMLQuantizationType.F32
        kinds[tensor.name] = kind = gguf.GGMLQuantizationType[stored] if tensor.quantized else kind
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = int(np.prod(tensor.shape)) // block * block_bytes
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(tensor.dtype), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        # One at a time, so that memory holds no more than the largest.
        values = tensor.read(source)
        if values.shape != tensor.shape or values.dtype != tensor.dtype:
            expected = f"{tensor.shape} of {np.dtype(tensor.dtype)}"
            raise ValueError(f"{tensor.name}: expected {expected}, got {values.shape} of {values.dtype}")
        kind = kinds[tensor.name]
        if tensor.quantized and kind != gguf.GGMLQuantizationType.BF16:
            values = gguf.quantize(_widen(values), kind)
        writer.write_tensor_data(values)
    writer.close()


def _widen(bits: NDArray) -> NDArray:
    """bfloat16 in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], stored: str) -> None:
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{stored}"])
    # Token numbers alone go in and out.
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * config["partial_rotary_factor"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_full_attention_interval(config["full_attention_interval"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_num_value_heads"] * config["linear_value_head_dim"])


class _Layout:
    """Which tensors of the checkpoint become which of the file."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.hidden: int = config["hidden_size"]
        self.names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3NEXT, config["num_hidden_layers"])

    def tensors(self) -> Iterator[Tensor]:
        vocabulary = self.config["vocab_size"]
        yield self._matrix("model.embed_tokens.weight", vocabulary, self.hidden)
        yield self._norm("model.norm.weight", self.hidden)
        yield self._matrix("lm_head.weight", vocabulary, self.hidden)
        for number in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{number}"
            yield self._norm(f"{layer}.input_layernorm.weight", self.hidden)
            yield self._norm(f"{layer}.post_attention_layernorm.weight", self.hidden)
            if (number + 1) % self.config["full_attention_interval"]:
                yield from self._linear(f"{layer}.linear_attn", number)
            else:
                yield from self._attention(f"{layer}.self_attn")
            yield from self._experts(f"{layer}.mlp")

    def _attention(self, layer: str) -> Iterator[Tensor]:
        size = self.config["head_dim"]
        queries, keys = self.config["num_attention_heads"] * size, self.config["num_key_value_heads"] * size
        yield self._linear_weight(f"{layer}.q_proj.weight", 2 * queries, self.hidden)
        yield self._linear_weight(f"{layer}.k_proj.weight", keys, self.hidden)
        yield self._linear_weight(f"{layer}.v_proj.weight", keys, self.hidden)
        yield self._linear_weight(f"{layer}.o_proj.weight", self.hidden, queries)
        yield self._norm(f"{layer}.q_norm.weight", size)
        yield self._norm(f"{layer}.k_norm.weight", size)

    def _linear(self, layer: str, number: int) -> Iterator[Tensor]:
        groups, heads = self.config["linear_num_key_heads"], self.config["linear_num_value_heads"]
        key, value = self.config["linear_key_head_dim"], self.config["linear_value_head_dim"]
        values, kernel = heads * value, self.config["linear_conv_kernel_dim"]
        channels = 2 * groups * key + values
        stored = (f"{layer}.in_proj_qkvz.weight", (channels + values, self.hidden))
        # A group of the checkpoint is a key head's q and k, then v and z of its value heads.
        cuts = (key, 2 * key, 2 * key + values // groups)

        def parts(source: Source) -> list[NDArray]:
            grouped = source(*stored).reshape(groups, -1, self.hidden)
            return [part.reshape(-1, self.hidden) for part in np.split(grouped, cuts, axis=1)]

        def mixed(source: Source) -> NDArray:
            return np.concatenate(parts(source)[:3])

        def gate(source: Source) -> NDArray:
            return np.ascontiguousarray(parts(source)[3])

        yield Tensor(f"blk.{number}.attn_qkv.weight", (channels, self.hidden), np.uint16, mixed, quantized=True)
        yield Tensor(f"blk.{number}.attn_gate.weight", (values, self.hidden), np.uint16, gate, quantized=True)
        yield self._matrix(f"{layer}.in_proj_ba.weight", 2 * heads, self.hidden)
        yield self._linear_weight(f"{layer}.out_proj.weight", self.hidden, values)
        # The kernel's middle dimension, of size 1, goes.
        stored_kernel = (channels, 1, kernel)
        yield self._wide(f"{layer}.conv1d.weight", stored_kernel, lambda weight: weight[:, 0], (channels, kernel))
        yield self._wide(f"{layer}.norm.weight", (value,))
        yield self._wide(f"{layer}.A_log", (heads,), lambda weight: -np.exp(weight))
        yield self._wide(f"{layer}.dt_bias", (heads,), as_name=f"{layer}.dt_proj.bias")

    def _experts(self, layer: str) -> Iterator[Tensor]:
        count, width = self.config["num_experts"], self.config["moe_intermediate_size"]
        shared = self.config["shared_expert_intermediate_size"]
        yield self._wide(f"{layer}.gate.weight", (count, self.hidden))
        yield self._wide(f"{layer}.shared_expert_gate.weight", (1, self.hidden))
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape, shape_shared = (width, self.hidden), (shared, self.hidden)
            if name == "down_proj":
                shape, shape_shared = shape[::-1], shape_shared[::-1]
            yield self._linear_weight(f"{layer}.shared_expert.{name}.weight", *shape_shared)

            def stack(source: Source, name: str = name, shape: tuple[int, int] = shape) -> NDArray:
                whole = np.empty((count, *shape), np.uint16)
                for expert in range(count):
                    whole[expert] = source(f"{layer}.experts.{expert}.{name}.weight", shape)
                return whole

            named = self._name(f"{layer}.experts.{name}.weight")
            yield Tensor(named, (count, *shape), np.uint16, stack, quantized=True)

    def _matrix(self, name: str, rows: int, columns: int) -> Tensor:
        return Tensor(self._name(name), (rows, columns), np.uint16, lambda source: source(name, (rows, columns)))

    def _linear_weight(self, name: str, rows: int, columns: int) -> Tensor:
        return replace(self._matrix(name, rows, columns), quantized=True)

    def _norm(self, name: str, size: int) -> Tensor:
        """A zero-centred norm: llama.cpp's multiply by the weight itself."""
        return self._wide(name, (size,), lambda weight: weight + 1)

    def _wide(
        self,
        name: str,
        stored: tuple[int, ...],
        change: Callable[[NDArray], NDArray] = lambda weight: weight,
        shape: tuple[int, ...] | None = None,
        as_name: str | None = None,
    ) -> Tensor:
        """One that the file has in float32."""

        def read(source: Source) -> NDArray:
            return np.ascontiguousarray(change(_widen(source(name, stored))))

        return Tensor(self._name(as_name or name), shape or stored, np.float32, read)

    def _name(self, name: str) -> str:
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, f"{name}: gguf knows no such tensor of Qwen3-Next"
        return found
