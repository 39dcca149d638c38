"""A real engine on the kernels for GPUs, interpreted: the greedy tokens of the C++ kernels, with and without drafts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import write_random_checkpoint
from tests.vllm.greedy_on_triton import MAX_TOKENS, PROMPTS

pytestmark = pytest.mark.vllm

SMALL = {"num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_value_head_dim": 16, "num_experts": 4}
"""Little of what the interpreter takes time for, programs."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("small") / "checkpoint", agreement=1.0, **SMALL)


@pytest.mark.parametrize("drafts", [0, 2])
def test_greedy_tokens_equal_those_of_the_native_kernels_in_float32(checkpoint: Path, drafts: int) -> None:
    command = [sys.executable, "-m", "tests.vllm.greedy_on_triton", str(checkpoint), str(drafts)]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert {"recurrent_kernel", "chunk_kernel", "state_kernel"} <= set(answer["kernels"])
    assert answer["triton"] == answer["native"]
    assert [len(tokens) for tokens in answer["triton"]] == [MAX_TOKENS] * len(PROMPTS)
    accepted, drafted = answer["drafts"]
    assert 0 < accepted < drafted if drafts else not drafted
