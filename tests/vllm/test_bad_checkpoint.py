"""A checkpoint with a missing tensor stops the engine with an error that names it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import TINY

pytestmark = pytest.mark.vllm

START = """
import sys
from vllm import LLM
LLM(sys.argv[1], enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=1 << 27)
"""
GONE = "model.layers.0.linear_attn.conv1d.weight"


def test_engine_names_the_missing_tensor(tmp_path: Path) -> None:
    checkpoint = shutil.copytree(TINY, tmp_path / "checkpoint")
    weights = load_file(checkpoint / "model.safetensors")
    del weights[GONE]
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    done = subprocess.run(
        [sys.executable, "-c", START, str(checkpoint)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0
    assert f"missing {GONE}" in done.stdout + done.stderr
    assert "Loading safetensors" not in done.stdout + done.stderr, "found before anything is loaded"
