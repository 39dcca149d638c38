"""A checkpoint with a fault, for the tests of ``qnext compare``."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.checkpoints import TINY

DISTURBED = "model.layers.1.linear_attn.out_proj.weight"


def write_disturbed_checkpoint(path: Path, factor: float = 0.5) -> Path:
    """The tiny checkpoint with one tensor multiplied by ``factor``."""
    shutil.copytree(TINY, path)
    tensors = load_file(path / "model.safetensors")
    tensors[DISTURBED] = tensors[DISTURBED] * factor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
