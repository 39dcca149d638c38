"""Plans a checkpoint and writes it, shard by shard."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import qnext_plugins
from qnext_kernels.integers import QUANTIZE
from qnext_plugins.cli.checkpoint.spec import FP8_BLOCK, Spec, SpecError, check
from qnext_plugins.cli.checkpoint.structure import Structure
from qnext_plugins.cli.checkpoint.tensors import (
    ALL_BUT_EXPERTS,
    FP8,
    Shape,
    Values,
    describe_fp8,
    describe_int4,
    in_int8,
    is_quantized,
    quantize,
)
from qnext_plugins.cli.checkpoint.tokenizer import FILES as TOKENIZER_FILES
from qnext_plugins.cli.checkpoint.tokenizer import StoredTokenizer, Vocabulary, generate, without_tokenizer
from qnext_plugins.model import expected_shapes, packed_shapes

SHARD_BYTES = 1 << 29
"""Of the tensors in a file, which are in memory together; a larger tensor has a file of its own."""
SPARE_BYTES = 64 << 20
"""Room for the tokenizer and the descriptions."""
MANIFEST = "qnext_checkpoint.json"
DESCRIPTIONS = ("config.json", "generation_config.json", MANIFEST, "model.safetensors.index.json")
SCALES = torch.bfloat16
INT4 = (torch.int32, SCALES, torch.int64)
"""Of the words, the scales and the shape of a weight."""


@dataclass(frozen=True)
class Stored:
    """A tensor as it stands in the files."""

    shape: Shape
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """What is going to be written."""

    spec: Spec
    weights: dict[str, Shape]
    """Tensors of the model, in their order."""
    shards: list[list[str]]
    """Names of the weights in each file."""

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.weights.values()))

    @property
    def bytes(self) -> int:
        """Of all tensors, scales among them."""
        return sum(stored.bytes for name in self.weights for stored in self.stored(name).values())

    def stored(self, name: str) -> dict[str, Stored]:
        """What a weight is in the files: itself, in FP8 two tensors, or in int4 three."""
        shape = self.weights[name]
        if not (self.spec.quantized and is_quantized(name)):
            return {name: Stored(shape, getattr(torch, self.spec.dtype))}
        if self.spec.int4 is not None:
            packed = packed_shapes(name, shape, self.spec.int4, self.bits(name))
            return {part: Stored(packed[part], dtype) for part, dtype in zip(packed, INT4, strict=True)}
        blocks = tuple(size // FP8_BLOCK for size in shape)
        return {name: Stored(shape, FP8), f"{name}_scale_inv": Stored(blocks, SCALES)}

    def bits(self, name: str) -> int:
        """Of a weight that is stored in integers."""
        return 8 if self.spec.int8 and in_int8(name) else 4


def plan(spec: Spec, shard_bytes: int = SHARD_BYTES) -> Plan:
    """Plan the checkpoint of ``spec``.

    Raises:
        SpecError: it cannot be made.
    """
    check(spec)
    weights = expected_shapes(spec.model(), target=True, mtp=spec.mtp)
    made = Plan(spec, weights, [])
    size = shard_bytes
    for name, shape in weights.items():
        if spec.fp8 and is_quantized(name) and any(width % FP8_BLOCK for width in shape):
            raise SpecError(f"--fp8: expected widths that are multiples of {FP8_BLOCK}, got {name} of {list(shape)}")
        if spec.int4 is not None and is_quantized(name) and shape[1] % spec.int4:
            raise SpecError(f"--int4: expected columns in whole groups of {spec.int4}, got {name} of {list(shape)}")
        own = sum(stored.bytes for stored in made.stored(name).values())
        if size + own > shard_bytes:
            made.shards.append([])
            size = 0
        made.shards[-1].append(name)
        size += own
    return made


def write(
    plan: Plan,
    folder: Path,
    *,
    tokenizer: StoredTokenizer | None = None,
    with_tokenizer: bool = True,
    force: bool = False,
    progress: Callable[[int], object] = lambda written: None,
) -> None:
    """Write a checkpoint; it is put into ``folder`` when it is complete, and nothing is left of an incomplete one.

    Args:
        plan: what to write.
        folder: where to; made if need be.
        tokenizer: to copy; without one, one is generated.
        with_tokenizer: whether there is to be one at all.
        force: replace the checkpoint that is there; other files in the folder stay.
        progress: called with the bytes of each tensor that has been made.

    Raises:
        SpecError: something is in the way, the disk is too small, or the tokenizer does not fit.
    """
    check_target(folder, plan, force)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        vocabulary = _write_tokenizer(plan.spec, work, tokenizer, with_tokenizer)
        _write_tensors(plan, work, _values(plan.spec, vocabulary), progress)
        _write_descriptions(plan, work, vocabulary)
        folder.mkdir(exist_ok=True)
        for old in checkpoint_files(folder):
            old.unlink()
        mode = (work / "config.json").stat().st_mode
        for file in work.iterdir():
            # safetensors makes files that nobody else may read.
            file.chmod(mode)
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(work)


def check_target(folder: Path, plan: Plan, force: bool) -> None:
    """Raise SpecError unless the checkpoint may and can be put into ``folder``."""
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"OUT: expected a folder, got the file {folder}")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise SpecError(f"OUT: expected an empty or new folder, got {folder} with files in it (--force replaces them)")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    needed, free = plan.bytes + SPARE_BYTES, shutil.disk_usage(existing).free
    if needed > free:
        raise SpecError(f"OUT: expected {needed / 1e9:.1f} GB of free disk, got {free / 1e9:.1f} at {existing}")


def checkpoint_files(folder: Path) -> list[Path]:
    """The files in a folder that belong to a checkpoint."""
    named = [folder / name for name in (*DESCRIPTIONS, *TOKENIZER_FILES)]
    return [file for file in named if file.is_file()] + sorted(folder.glob("model*.safetensors"))


def _write_tokenizer(spec: Spec, folder: Path, stored: StoredTokenizer | None, wanted: bool) -> Vocabulary:
    size = spec.widths.vocab_size
    if not wanted:
        return without_tokenizer(size)
    if stored is not None:
        return stored.copy(folder, size)
    return generate(folder, size, spec.config(end_token=0)["max_position_embeddings"])


def _values(spec: Spec, vocabulary: Vocabulary) -> Values:
    if not spec.structured:
        return Values(spec, None)
    widths = spec.widths
    return Values(
        spec, Structure(widths.vocab_size, widths.hidden_size, vocabulary.outside, spec.mtp_acceptance, spec.seed)
    )


def _write_tensors(plan: Plan, folder: Path, values: Values, progress: Callable[[int], object]) -> None:
    count = len(plan.shards)
    files: dict[str, str] = {}
    for n, names in enumerate(plan.shards, start=1):
        file = "model.safetensors" if count == 1 else f"model-{n:05}-of-{count:05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= _tensors(plan, name, values)
            progress(sum(stored.bytes for stored in plan.stored(name).values()))
        save_file(tensors, folder / file, {"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    if count > 1:
        index = {"metadata": {"total_size": plan.bytes}, "weight_map": files}
        _write_json(folder / "model.safetensors.index.json", index)


def _tensors(plan: Plan, name: str, values: Values) -> dict[str, Tensor]:
    weight, stored = values.make(name, plan.weights[name]), plan.stored(name)
    if len(stored) == 1:
        return {name: weight}
    if plan.spec.int4 is not None:
        numbers, scale = QUANTIZE[plan.bits(name)](weight, plan.spec.int4)
        tensors: tuple[Tensor, ...] = (numbers.view(torch.int32), scale, torch.tensor(weight.shape))
    else:
        tensors = quantize(weight)
    return dict(zip(stored, tensors, strict=True))


def _write_descriptions(plan: Plan, folder: Path, vocabulary: Vocabulary) -> None:
    tokens = {"bos_token_id": vocabulary.padding, "eos_token_id": vocabulary.stop, "pad_token_id": vocabulary.padding}
    config = plan.spec.config(vocabulary.stop) | tokens
    if plan.spec.fp8:
        config["quantization_config"] = describe_fp8(_unquantized(plan))
    elif plan.spec.int4 is not None:
        config["quantization_config"] = describe_int4(
            _unquantized(plan), plan.spec.int4, ALL_BUT_EXPERTS if plan.spec.int8 else ()
        )
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", tokens | {"do_sample": False})
    manifest = {"qnext_plugins": qnext_plugins.__version__, "parameters": plan.parameters, "bytes": plan.bytes}
    _write_json(folder / MANIFEST, manifest | plan.spec.model_dump(mode="json"))


def _unquantized(plan: Plan) -> Iterator[str]:
    """Modules and parameters that stay as they are, as the published checkpoints list them."""
    yield "lm_head"
    for name in plan.weights:
        if (".layers." in name or name.startswith("mtp.")) and not is_quantized(name):
            yield name.removesuffix(".weight")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
