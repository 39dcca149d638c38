"""A checkpoint with missing or surplus tensors stops the engine with an error that names them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import TINY

pytestmark = pytest.mark.vllm

START = """
import sys
from vllm import LLM
LLM(sys.argv[1], enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=1 << 27)
"""
GONE = "model.layers.0.linear_attn.conv1d.weight"
SURPLUS = "model.layers.3.self_attn.sinks"


@pytest.mark.parametrize(
    ("change", "named"),
    [("missing", f"missing {GONE}"), ("surplus", f"surplus tensor {SURPLUS}")],
)
def test_engine_names_the_tensor(tmp_path: Path, change: str, named: str) -> None:
    checkpoint = shutil.copytree(TINY, tmp_path / "checkpoint")
    weights = load_file(checkpoint / "model.safetensors")
    if change == "missing":
        del weights[GONE]
    else:
        weights[SURPLUS] = torch.zeros(4)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    done = subprocess.run(
        [sys.executable, "-c", START, str(checkpoint)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0
    assert named in done.stdout + done.stderr
    assert "Loading safetensors" not in done.stdout + done.stderr, "found before anything is loaded"
