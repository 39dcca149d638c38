"""The checkpoint that ``--model`` names: is it whole, is it a Qwen3-Next, is there memory for it?"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qnext_plugins.cli.doctor.findings import Finding, Subject, failure, note, ok, warning
from qnext_plugins.cli.doctor.machine import device_type, memory_bytes

ARCHITECTURE = "Qwen3NextForCausalLM"
GIB = 1 << 30


def subject_of(model: str | None) -> Subject:
    """Find a checkpoint: a folder, or a name whose files are in the Hugging Face cache. Nothing is downloaded.

    Raises:
        ValueError: a folder without a readable config.json.
    """
    if model is None:
        return Subject()
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise ValueError(
                f"--model: expected a folder or a name such as Qwen/Qwen3-Next-80B-A3B-Instruct, got {model}"
            )
        return _from_cache(model)
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except OSError:
        raise ValueError(f"--model: expected a folder with a config.json, got {folder}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"--model: {file}: expected JSON, got {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"--model: {file}: expected a JSON object, got {type(config).__name__}")
    return Subject(model, folder, config)


def _from_cache(name: str) -> Subject:
    try:
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(name, "config.json")
    except ImportError:
        return Subject(name)
    except ValueError as error:
        raise ValueError(f"--model: {error}") from None
    if not isinstance(file, str):
        return Subject(name)
    return Subject(name, Path(file).parent, json.loads(Path(file).read_text()))


def architecture(subject: Subject) -> Finding | None:
    """The plugin serves one architecture, and reads its configuration."""
    if subject.model is None:
        return None
    if subject.config is None:
        return note(f"{subject.model} is not on this machine yet; its configuration was not checked")
    architectures = subject.config.get("architectures") or []
    if ARCHITECTURE not in architectures:
        return failure(
            f"architectures is {architectures}: the plugin serves {ARCHITECTURE}, the engine's own model serves this",
            "name another checkpoint",
        )
    from qnext_plugins.model import ConfigError

    try:
        config = model_config(subject.config)
    except ConfigError as error:
        return failure(str(error), "correct the config.json of the checkpoint")
    return ok(f"{ARCHITECTURE} with {config.num_hidden_layers} layers, {config.num_experts} experts")


def model_config(config: dict[str, Any]) -> Any:
    """The configuration as the model reads it, behind transformers' defaults; raises ConfigError."""
    from qnext_plugins.model import ConfigError, Qwen3NextConfig

    try:
        from transformers import Qwen3NextConfig as Stored
    except ImportError:
        return Qwen3NextConfig.from_hf(SimpleNamespace(**config))
    try:
        stored = Stored.from_dict(config)
    # Of many kinds: by the field, and by the version of transformers.
    except Exception as error:
        raise ConfigError(f"config.json: transformers refuses it: {' '.join(str(error).split())}") from None
    return Qwen3NextConfig.from_hf(stored)


def weights(subject: Subject) -> Finding | None:
    """Every file of the index is there, every tensor has its shape."""
    if subject.folder is None or subject.config is None:
        return None
    if ARCHITECTURE not in (subject.config.get("architectures") or ()):
        return None
    from qnext_plugins.model import CheckpointError, integer_obstacle, is_block_fp8, weight_files

    try:
        files = weight_files(subject.folder)
    except CheckpointError as error:
        return failure(str(error), "download the checkpoint again")
    if not files:
        return failure(f"{subject.folder} has no safetensors files", "download the checkpoint's weights")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        return failure(
            f"{len(missing)} of {len(files)} files that the index names are missing, {missing[0]} first",
            "finish the download",
        )
    quantization = subject.config.get("quantization_config")
    if quantization and not is_block_fp8(quantization) and integer_obstacle(quantization) is not None:
        return ok(f"{len(files)} files, all there; quantized, so that the shapes of the tensors were not checked")
    return _tensors(subject)


def _tensors(subject: Subject) -> Finding | None:
    from qnext_plugins.model import (
        CheckpointError,
        ConfigError,
        IntegerWeights,
        as_compressed_tensors,
        check_files,
        expected_shapes,
        fp8_shapes,
        integer_obstacle,
        stored_names,
    )
    from qnext_plugins.model.weights import MTP_PREFIX

    assert subject.folder is not None
    assert subject.config is not None
    try:
        config = model_config(subject.config)
    except ConfigError:  # which the check of the architecture tells
        return None
    quantization = subject.config.get("quantization_config")

    def shapes(**parts: bool) -> dict[str, tuple[int, ...]]:
        plain = expected_shapes(config, **parts)
        if not quantization:
            return plain
        if integer_obstacle(quantization) is None:
            return IntegerWeights(as_compressed_tensors(quantization, names)).shapes(plain)
        return fp8_shapes(plain, quantization.get("modules_to_not_convert") or ())

    try:
        names = stored_names(str(subject.folder))
        check_files(subject.folder, shapes(), passing=(MTP_PREFIX,))
    except CheckpointError as error:
        return failure(f"{error}", "download the checkpoint again, or correct its config.json")
    try:
        check_files(subject.folder, shapes(target=False, mtp=True), passing=("model.layers.", "model.norm."))
    except CheckpointError as error:
        return note(f"complete without the draft's tensors ({error}): speculation will not start")
    return ok("every tensor of the model and of its draft is there, with its shape")


def memory(subject: Subject) -> Finding | None:
    """The weights fit into the memory."""
    if subject.folder is None or device_type() != "cpu":
        return None
    from qnext_plugins.model import CheckpointError, weight_files

    try:
        files = weight_files(subject.folder)
    except CheckpointError:  # which the check of the weights tells
        return None
    size = sum(file.stat().st_size for file in files if file.is_file())
    here = memory_bytes()
    total, available = here["MemTotal"], here["MemAvailable"]
    sizes = f"{size / GIB:.2f} GiB of weights, {available / GIB:.1f} of {total / GIB:.1f} GiB memory available"
    if size > total:
        return failure(sizes, "take a machine with more memory, or a smaller checkpoint")
    if size > 0.9 * available:
        return warning(sizes, "end other programs, or take a machine with more memory")
    return ok(sizes)


def tokenizer(subject: Subject) -> Finding | None:
    """The engines load a tokenizer from the checkpoint's folder."""
    if subject.folder is None:
        return None
    if (subject.folder / "tokenizer.json").is_file() or (subject.folder / "vocab.json").is_file():
        return ok("there is a tokenizer")
    return warning(
        "there is no tokenizer (tokenizer.json): the engines refuse text",
        "copy one into the folder, or start the engine with --skip-tokenizer-init and send token ids",
    )


CHECKS = (architecture, weights, memory, tokenizer)
