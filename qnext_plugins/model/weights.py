"""The tensors of a Qwen3-Next checkpoint: names, shapes, and a check of what a loader is fed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qnext_kernels.fp8 import FP8_GROUP
from qnext_plugins.model.config import FULL_ATTENTION, CheckpointError, Qwen3NextConfig
from qnext_plugins.model.gptq import packed_names

MTP_PREFIX = "mtp."
INDEX = "model.safetensors.index.json"
EXPERTS = ".mlp.experts."
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
NEVER_QUANTIZED = ("embed_tokens", "lm_head", "gate", "shared_expert_gate")


def expected_shapes(config: Qwen3NextConfig, *, target: bool = True, mtp: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an unquantized checkpoint's tensors; see :func:`fp8_shapes` and ``IntegerWeights.shapes``.

    Args:
        config: of the checkpoint.
        target: the model's own tensors.
        mtp: the draft's ``mtp.*`` tensors, with the embedding and the head that it shares.
    """
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    if target:
        for n, layer_type in enumerate(config.layer_types):
            shapes |= _layer_shapes(config, f"model.layers.{n}", layer_type, sparse=config.is_sparse(n))
        shapes["model.norm.weight"] = (hidden,)
    if mtp:
        shapes["mtp.fc.weight"] = (hidden, 2 * hidden)
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            shapes[f"mtp.{name}.weight"] = (hidden,)
        for n in range(config.num_nextn_predict_layers):
            shapes |= _layer_shapes(config, f"mtp.layers.{n}", FULL_ATTENTION, sparse=config.num_experts > 0)
    return shapes


def is_block_fp8(quantization: Mapping[str, Any] | None) -> bool:
    """Whether a checkpoint's ``quantization_config`` says FP8 in blocks of 128 × 128, which our kernels read."""
    described = quantization or {}
    return described.get("quant_method") == "fp8" and described.get("weight_block_size") == [FP8_GROUP] * 2


def modules_of(shapes: Iterable[str]) -> set[str]:
    """The modules of a checkpoint's tensors; experts of a layer are one, as all of them are quantized or none."""
    split = (name.partition(EXPERTS) for name in shapes)
    return {f"{layer}{EXPERTS[:-1]}" if experts else layer.rpartition(".")[0] for layer, experts, _ in split}


def fp8_shapes(shapes: Mapping[str, tuple[int, ...]], left_out: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Those of the same checkpoint in block-wise FP8: beside the weight of each linear the scales of its blocks.

    Args:
        shapes: of :func:`expected_shapes`.
        left_out: ``modules_to_not_convert``; experts are left out where one of them is.
    """
    quantized = _quantized(shapes, left_out)
    stored: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        stored[name] = shape
        if name in quantized:
            stored[f"{name}_scale_inv"] = tuple(-(-size // FP8_GROUP) for size in shape)
    return stored


def is_linear_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear that a quantized checkpoint may hold otherwise."""
    module, _, parameter = name.rpartition(".")
    return parameter == "weight" and len(shape) == 2 and module.rpartition(".")[2] not in NEVER_QUANTIZED


def _quantized(shapes: Mapping[str, tuple[int, ...]], left_out: Collection[str]) -> set[str]:
    """Names of the weights that are quantized where these modules are not."""
    layers = {f"{name}.".partition(EXPERTS)[0] for name in left_out if EXPERTS in f"{name}."}
    quantized = set()
    for name, shape in shapes.items():
        module = name.rpartition(".")[0]
        layer, experts, _ = module.partition(EXPERTS)
        if is_linear_weight(name, shape) and not (layer in layers if experts else module in left_out):
            quantized.add(name)
    return quantized


def checked_weights(
    weights: Iterable[tuple[str, Tensor]],
    shapes: dict[str, tuple[int, ...]],
    *,
    passing: tuple[str, ...] = (),
    experts_of_a_rank: bool = False,
    complete: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Pass a checkpoint's tensors on, one by one, if they are the expected ones.

    Args:
        weights: names and tensors.
        shapes: of :func:`expected_shapes`.
        passing: prefixes of names that belong to another model and are dropped.
        experts_of_a_rank: the engine reads no experts of other ranks, so that any may be missing.
        complete: whether all of them are to be there.

    Raises:
        CheckpointError: at the first surplus or misshapen tensor, before it is passed on; at the end, if any is
            missing that is to be there.
    """
    missing = dict(shapes)
    for name, tensor in weights:
        if name.startswith(passing) or name.endswith(IGNORED_SUFFIXES):
            continue
        _check_tensor(name, tuple(tensor.shape), shapes)
        missing.pop(name, None)
        yield name, tensor
    if experts_of_a_rank:
        missing = {name: shape for name, shape in missing.items() if EXPERTS not in name}
    if complete:
        _check_complete(missing)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a loader would read, there or not: those of the index, or ``model.safetensors``.

    Raises:
        CheckpointError: the index is none.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    if not index.is_file():
        return [single] if single.is_file() else []
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, Path]:
    """Files by the names of their tensors."""
    try:
        return {name: index.parent / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"checkpoint: {index}: expected a weight_map from tensors to files") from None


def _headers(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a file's tensors; raises CheckpointError where it cannot be read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                yield name, tuple(tensors.get_slice(name).get_shape())
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint: {file} cannot be read: {error}") from None


def stored_names(model: str, revision: str | None = None) -> set[str]:
    """Names of a checkpoint's tensors, by its index or its only file; none where they are not to be had beforehand.

    Args:
        model: a folder, or a name on Hugging Face, of which the index alone is downloaded.
        revision: of the latter.

    Raises:
        CheckpointError: a file cannot be read.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        try:
            folder = Path(hf_hub_download(model, INDEX, revision=revision)).parent
        except (OSError, ValueError):  # neither there nor to be reached, or no name; loading says which
            return set()
    if (folder / INDEX).is_file():
        return set(_weight_map(folder / INDEX))
    return {name for file in weight_files(folder) for name, _ in _headers(file)}


def check_files(folder: Path, shapes: dict[str, tuple[int, ...]], *, passing: tuple[str, ...] = ()) -> None:
    """Check the headers of a checkpoint's safetensors files, before anything is allocated or read.

    Args:
        folder: of the checkpoint. Only its :func:`weight_files` are looked at; without any nothing is checked.
        shapes: of :func:`expected_shapes`.
        passing: prefixes of names that belong to another model.

    Raises:
        CheckpointError: a tensor is missing, surplus or misshapen, or a file cannot be read.
    """
    if not (files := weight_files(folder)):
        return
    missing = dict(shapes)
    for file in files:
        for name, stored in _headers(file):
            if name.startswith(passing) or name.endswith(IGNORED_SUFFIXES):
                continue
            for known, shape in packed_names(name, stored).items():
                _check_tensor(known, shape, shapes)
                missing.pop(known, None)
    _check_complete(missing)


def _check_tensor(name: str, shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]]) -> None:
    if name not in shapes:
        raise CheckpointError(f"checkpoint: surplus tensor {name} {list(shape)}")
    if shape != shapes[name]:
        raise CheckpointError(f"checkpoint: tensor {name}: expected shape {list(shapes[name])}, got {list(shape)}")


def _check_complete(missing: dict[str, tuple[int, ...]]) -> None:
    if missing:
        shown = ", ".join(sorted(missing)[:8])
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise CheckpointError(f"checkpoint: missing {shown}{more}")


def _layer_shapes(config: Qwen3NextConfig, prefix: str, layer_type: str, *, sparse: bool) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    mixer = _attention_shapes(config) if layer_type == FULL_ATTENTION else _delta_net_shapes(config)
    shapes = {**mixer, "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if sparse:
        shapes["mlp.gate.weight"] = (config.num_experts, hidden)
        for e in range(config.num_experts):
            shapes |= _mlp_shapes(f"mlp.experts.{e}", hidden, config.moe_intermediate_size)
        if config.shared_expert_intermediate_size > 0:
            shapes |= _mlp_shapes("mlp.shared_expert", hidden, config.shared_expert_intermediate_size)
            shapes["mlp.shared_expert_gate.weight"] = (1, hidden)
    else:
        shapes |= _mlp_shapes("mlp", hidden, config.intermediate_size)
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _delta_net_shapes(config: Qwen3NextConfig) -> dict[str, tuple[int, ...]]:
    hidden, heads = config.hidden_size, config.linear_num_value_heads
    shapes: dict[str, tuple[int, ...]] = {
        "in_proj_qkvz.weight": (2 * config.key_dim + 2 * config.value_dim, hidden),
        "in_proj_ba.weight": (2 * heads, hidden),
        "conv1d.weight": (2 * config.key_dim + config.value_dim, 1, config.linear_conv_kernel_dim),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "norm.weight": (config.linear_value_head_dim,),
        "out_proj.weight": (hidden, config.value_dim),
    }
    return {f"linear_attn.{name}": shape for name, shape in shapes.items()}


def _attention_shapes(config: Qwen3NextConfig) -> dict[str, tuple[int, ...]]:
    hidden, head_dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    outputs = {"q_proj": 2 * queries, "k_proj": keys, "v_proj": keys}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (size, hidden) for name, size in outputs.items()}
    shapes |= {"o_proj.weight": (hidden, queries), "q_norm.weight": (head_dim,), "k_norm.weight": (head_dim,)}
    if config.attention_bias:
        shapes |= {f"{name}.bias": (size,) for name, size in {**outputs, "o_proj": hidden}.items()}
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _mlp_shapes(prefix: str, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (intermediate, hidden),
        f"{prefix}.up_proj.weight": (intermediate, hidden),
        f"{prefix}.down_proj.weight": (hidden, intermediate),
    }
