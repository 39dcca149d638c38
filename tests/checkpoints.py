"""Checkpoints for tests: the trained one of ``examples/tiny``, and random ones whose draft is sometimes right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3NextConfig, Qwen3NextForCausalLM

from qnext_kernels.fp8 import dequantize_blocks
from qnext_kernels.integers import QUANTIZE
from qnext_kernels.quantized import dequantize
from qnext_plugins.cli.checkpoint.tensors import describe_int4, is_quantized, quantize
from qnext_plugins.model import IntegerWeights
from qnext_plugins.model.gptq import MIDDLES
from qnext_plugins.model.weights import is_linear_weight

TINY = Path(__file__).parents[1] / "examples" / "tiny" / "checkpoint"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def random_config(**overrides: Any) -> Qwen3NextConfig:
    """Six linear and two full-attention layers; groups of 3 value heads, key dim ≠ value dim, one dense layer."""
    values: dict[str, Any] = {
        "vocab_size": len(AutoTokenizer.from_pretrained(TINY)),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "full_attention_interval": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10_000_000.0,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "num_experts": 16,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    return Qwen3NextConfig(**values | overrides)


def quantize_experts(path: Path) -> None:
    """Turn a float32 checkpoint into one in bfloat16 with experts in FP8, each of their matrices a single block."""
    weights, kept = {}, set()
    for name, weight in load_file(path / "model.safetensors").items():
        if ".mlp.experts." in name or ".mlp.shared_expert." in name:
            scale = weight.abs().max().view(1, 1) / torch.finfo(torch.float8_e4m3fn).max
            weights[name] = (weight / scale).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scale
        else:
            weights[name] = weight.bfloat16()
            kept.add(name.removesuffix(".weight"))
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    _describe_fp8(path, kept)


def _describe_fp8(path: Path, kept: set[str]) -> None:
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    _describe(path, quantization | {"modules_to_not_convert": sorted(kept)})


def _describe(path: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config, indent=2))


def write_fp8_checkpoint(path: Path, dequantized: Path) -> None:
    """Write a random checkpoint in block-wise FP8, laid out as the published ones, and the same one in float32.

    Every matrix has several blocks of scales that differ, and so has each of two ranks' part of it.
    """
    _write_wide_checkpoint(dequantized)
    shutil.copytree(dequantized, path)
    stored, read, kept = {}, {}, set()
    for name, weight in load_file(dequantized / "model.safetensors").items():
        stored[name] = read[name] = weight
        if not is_quantized(name):
            kept.add(name.removesuffix(".weight"))
            continue
        factors = torch.rand([size // 128 for size in weight.shape]) + 0.5
        varied = weight * factors.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
        stored[name], scale = quantize(varied)
        stored[f"{name}_scale_inv"] = scale
        read[name] = dequantize_blocks(stored[name], scale.float(), torch.float32)
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    save_file(read, dequantized / "model.safetensors", {"format": "pt"})
    _describe_fp8(path, kept)


def write_int4_checkpoint(
    quantized: Path,
    float32: Path,
    group: int = 32,
    *,
    ignore: tuple[str, ...] = (),
    in_int8: tuple[str, ...] = (),
    **overrides: Any,
) -> None:
    """Write a random checkpoint in int4, laid out as compressed-tensors does, and the same one in float32.

    Its scales are numbers of bfloat16, stored in float32, so that it stands for the same in either. Every row has
    several groups that differ, and so has each of two ranks' part of it.

    Args:
        quantized: where it is written.
        float32: where what its weights stand for is written.
        group: columns that share a scale, one of INT_GROUPS.
        ignore: entries of its ``ignore`` beside those that name what is quantized nowhere; what they cover is not.
        in_int8: targets, by names and patterns, that are in int8, also linears that are in int4 nowhere.
        overrides: of :func:`random_config`.
    """
    _write_wide_checkpoint(float32, **overrides)
    shutil.copytree(float32, quantized)
    weights = load_file(float32 / "model.safetensors")
    targets = IntegerWeights(describe_int4([], group, in_int8))
    quantized_names = {
        name
        for name, weight in weights.items()
        if is_quantized(name)
        or (is_linear_weight(name, tuple(weight.shape)) and targets.bits(name.removesuffix(".weight")) == 8)
    }
    kept = {name.removesuffix(".weight") for name in weights if name not in quantized_names}
    described = describe_int4([*sorted(kept), *ignore], group, in_int8)
    integers = IntegerWeights(described)
    stored, read = {}, {}
    for name, weight in weights.items():
        stored[name] = read[name] = weight
        bits = integers.bits(name.removesuffix(".weight")) if name in quantized_names else None
        if bits is None:
            continue
        numbers, scale = QUANTIZE[bits](weight.bfloat16(), group)
        words = numbers.view(torch.int32)
        del stored[name]
        stored |= {f"{name}_packed": words, f"{name}_scale": scale.float(), f"{name}_shape": torch.tensor(weight.shape)}
        read[name] = dequantize(numbers, scale, torch.float32)
    save_file(stored, quantized / "model.safetensors", {"format": "pt"})
    save_file(read, float32 / "model.safetensors", {"format": "pt"})
    _describe(quantized, described)


IN_INT8 = ("re:.*self_attn.*", r"re:.*\.shared_expert\..*", "re:.*in_proj_.*", "mtp.fc")
"""What AutoRound has in int8 beside experts in int4, the projections of gates too."""
NOT_QUANTIZED = ("re:.*linear_attn.out_proj", "re:mtp.layers.*")


def store_as_gptq(path: Path, to: Path, method: str, *, tells: bool = True) -> Path:
    """Copy an int4 checkpoint as GPTQ ("gptq", its first format) or AutoRound ("auto-round") stores the same.

    ``tells``: whether its ``config.json`` says what is not quantized, beside what is in int8.
    """
    shutil.copytree(path, to)
    given = json.loads((path / "config.json").read_text())["quantization_config"]
    scheme, *others = given["config_groups"].values()
    group, integers = scheme["weights"]["group_size"], IntegerWeights(given)
    ignored = given["ignore"] if tells else []
    in_int8 = [entry for other in others for entry in other["targets"]]
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            stored[f"{module}.qweight"] = tensor.t().contiguous()
        elif kind == "weight_scale":
            stored[f"{module}.scales"] = tensor.t().contiguous()
        elif kind == "weight_shape":
            rows, columns = tensor.tolist()
            bits = integers.bits(module)
            zeros = torch.full((columns // group, rows * bits // 32), MIDDLES[bits][0], dtype=torch.int32)
            stored[f"{module}.qzeros"] = zeros
            if method == "gptq":
                stored[f"{module}.g_idx"] = (torch.arange(columns) // group).int()
        else:
            stored[name] = tensor
    save_file(stored, to / "model.safetensors", {"format": "pt"})
    described = {"quant_method": method, "bits": 4, "group_size": group, "sym": True}
    if method == "gptq":
        rules: dict[str, Any] = {f"-:{entry.removeprefix('re:')}": {} for entry in ignored}
        rules |= {f"+:{entry.removeprefix('re:')}": {"bits": 8} for entry in in_int8}
        described |= {"desc_act": False, "lm_head": False, "checkpoint_format": "gptq", "dynamic": rules}
    else:
        described |= {"data_type": "int", "packing_format": "auto_round:auto_gptq"}
        described["extra_config"] = {
            entry.removeprefix("re:"): {"bits": bits}
            for bits, entries in ((16, ignored), (8, in_int8))
            for entry in entries
        }
    _describe(to, described)
    return to


def _write_wide_checkpoint(path: Path, **overrides: Any) -> None:
    """Of which every linear has at least 128 rows and columns on each of two ranks."""
    values: dict[str, Any] = {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "head_dim": 128,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "num_experts": 8,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "mlp_only_layers": [],
    }
    write_random_checkpoint(path, agreement=0.5, **values | overrides)


def write_random_checkpoint(path: Path, *, seed: int = 0, agreement: float = 0.35, **overrides: Any) -> Path:
    """Write a random float32 checkpoint with MTP to ``path``.

    The head's row for a token is the embedding of the token before it in a random cycle, so that both the model and the
    draft lean towards the cycle's next token; the layers disturb them differently. The larger ``agreement``, the weaker
    the layers beside the embedding and the more drafts are accepted.
    """
    torch.manual_seed(seed)
    config = random_config(**overrides)
    model = Qwen3NextForCausalLM(config).float()
    model.save_pretrained(path)
    # transformers writes only the layer types that follow from it.
    interval = {"full_attention_interval": overrides.get("full_attention_interval", 4)}
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(written | interval, indent=2))
    weights = load_file(path / "model.safetensors")
    hidden, vocabulary = config.hidden_size, config.vocab_size
    last_full = max(n for n, kind in enumerate(config.layer_types) if kind == "full_attention")
    source = f"model.layers.{last_full}."
    draft = {f"mtp.layers.0.{name[len(source) :]}": w for name, w in weights.items() if name.startswith(source)}
    weights |= {name: torch.randn(w.shape) * 0.02 for name, w in draft.items()}
    for name, weight in weights.items():
        if name.endswith("conv1d.weight"):
            weights[name] = torch.randn(weight.shape) * 0.4
        elif ".layers." in name and weight.dim() >= 2:
            weights[name] = weight * 3.0
        elif "norm" in name:
            weights[name] = weight + torch.randn(weight.shape) * 0.1
    embedding, order = torch.randn(vocabulary, hidden), torch.randperm(vocabulary)
    head = torch.empty(vocabulary, hidden)
    head[order.roll(-1)] = embedding[order]
    weights["model.embed_tokens.weight"] = embedding * agreement
    weights["lm_head.weight"] = head * 0.1
    weights["mtp.fc.weight"] = torch.cat([torch.eye(hidden) * agreement, torch.randn(hidden, hidden) * 0.3], dim=1)
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        weights[f"mtp.{name}.weight"] = torch.randn(hidden) * 0.1
    save_file({name: w.contiguous() for name, w in weights.items()}, path / "model.safetensors", {"format": "pt"})
    for name in TOKENIZER_FILES:
        shutil.copy(TINY / name, path)
    return path
