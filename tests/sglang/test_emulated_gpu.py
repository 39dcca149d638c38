"""SGLang's own code for CUDA with our model in it, on an emulated device: graphs are captured and replayed.

What is emulated and what is real, ``tests.sglang.emulated`` says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import reference
from tests.checkpoints import write_random_checkpoint
from tests.reference import Tokens
from tests.sglang.test_triton import SMALLER

pytestmark = pytest.mark.sglang

MAX_TOKENS = 5
LONG = tuple(range(20, 86))
"""More than the 64 tokens of a chunk, behind which the prefix cache keeps the states."""
SHORT, OTHER = tuple(range(60, 65)), tuple(range(40, 44))
SIZES: dict[str, Any] = {
    "dtype": "float32",
    "context_length": 1024,
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "max_running_requests": 2,
    "max_total_tokens": 1024,
    "max_mamba_cache_size": 24,
    "chunked_prefill_size": 64,
    "cuda_graph_bs_prefill": [8],
    "cuda_graph_bs_decode": [2],
}
"""Each graph is larger than what a request alone needs."""
DRAFTS = {
    "speculative_algorithm": "NEXTN",
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # So little agreement that the tokens change where a state does. The draft looks at the last token alone.
    path = tmp_path_factory.mktemp("smaller") / "checkpoint"
    write_random_checkpoint(path, agreement=0.15, **SMALLER)
    weights = load_file(path / "model.safetensors")
    hidden = weights["mtp.fc.weight"].shape[0]
    weights["mtp.fc.weight"] = torch.eye(hidden, 2 * hidden)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def run(*arguments: str) -> str:
    """The last line that Python prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "QNEXT_STRICT": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


def serve(checkpoint: Path, rounds: list[list[Tokens]], **options: Any) -> dict[str, Any]:
    """Serve the prompts, and give what was seen; the tokens are those of transformers."""
    given = {"rounds": rounds, "max_tokens": MAX_TOKENS} | SIZES | options
    seen: dict[str, Any] = json.loads(run("-m", "tests.sglang.emulated.scheduler", str(checkpoint), json.dumps(given)))
    expected = [[list(reference.greedy(checkpoint, prompt, MAX_TOKENS)) for prompt in asked] for asked in rounds]
    assert seen["tokens"] == expected
    return seen


def test_tokens_of_graphs_and_of_the_prefix_cache_equal_those_of_transformers(checkpoint: Path) -> None:
    seen = serve(checkpoint, [[LONG], [(*LONG, *SHORT), SHORT], [OTHER]])
    assert seen["cached"] == 64
    assert seen["prefills"] > 0
    assert seen["replays"] > MAX_TOKENS
    assert {"gated_delta_net_kernel", "chunk_kernel", "track_mamba_state_if_needed_kernel"} <= set(seen["launched"])


def test_drafts_and_their_verification_in_graphs_change_no_token(checkpoint: Path) -> None:
    seen = serve(checkpoint, [[SHORT], [OTHER]], **DRAFTS)
    assert 0 < seen["accepted"] < 3 * seen["steps"]
    assert seen["prefills"] > 0
    assert {"recurrent_kernel", "_fused_mamba_state_scatter_with_mask_kernel"} <= set(seen["launched"])
    assert "gated_delta_net_kernel" not in seen["launched"], "a decode without drafts"


CHECKS = """
import torch
from tests.sglang.emulated import cuda, graphs

cuda.install()
graphs.install()


def refused(function):
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            function()
    except (RuntimeError, TypeError):
        return True


x, host, outside = torch.ones(2, device="cuda"), torch.ones(2), torch.zeros(2, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    made = x * 2
    outside += made
captured = made.tolist() + outside.tolist()
x.fill_(3)
graph.replay()
graph.replay()
seen = [
    captured[0] != captured[0] and captured[2:] == [0, 0],
    made.tolist() == [6, 6] and outside.tolist() == [12, 12],
    refused(lambda: x.sum().item()),
    refused(lambda: x.tolist()),
    refused(lambda: x.cpu()),
    refused(lambda: torch.tensor([1.0]).to("cuda")),
    refused(lambda: x[x > 1]),
    refused(lambda: x + host),
    refused(lambda: x.numpy()),
    not refused(lambda: host.sum().item() + len(host.cpu())),
    str(x.device) == str((x.cpu().to(x) + 1).device) == "cuda:0" and str(host.device) == "cpu",
]
print([n for n, right in enumerate(seen) if not right])
"""


def test_an_emulated_graph_holds_what_a_real_one_does_and_refuses_what_cuda_refuses() -> None:
    assert run("-c", CHECKS) == "[]"
