"""vLLM with our model and SGLang with our model: the same tokens in float32, and the same log-probabilities."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests import reference
from tests.reference import first_difference
from tests.sglang.engines import engine

pytestmark = pytest.mark.sglang

ROOT = Path(__file__).parents[2]
LOG_PROB_TOLERANCE = 1e-3


def test_vllm_and_sglang_give_the_same_tokens_and_log_probs(random_checkpoint: Path, tmp_path: Path) -> None:
    python = os.environ.get("QNEXT_VLLM_PYTHON")
    assert python, "QNEXT_VLLM_PYTHON: expected the python of the environment with vLLM (`make test-sglang` sets it)"
    file = tmp_path / "vllm.json"
    command = [python, "-m", "tests.vllm.write_greedy", str(random_checkpoint), str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert file.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    vllm = json.loads(file.read_text())
    prompts = reference.prompts(random_checkpoint)
    with engine(random_checkpoint) as running:
        sglang = running.greedy_with_log_probs(prompts)
    assert len(vllm) == len(prompts) >= 30
    assert first_difference([tuple(tokens) for tokens, _ in vllm], [tokens for tokens, _ in sglang]) is None
    differences = torch.stack([(torch.tensor(a) - b).abs() for (_, a), (_, b) in zip(vllm, sglang, strict=True)])
    print(f"largest |Δ log p| between the engines: {differences.max():.2e}")
    assert differences.max() < LOG_PROB_TOLERANCE
