"""A real engine on the kernels for GPUs, interpreted: transformers' greedy tokens, with and without drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import reference
from tests.checkpoints import quantize_experts, write_random_checkpoint
from tests.determinism import Request
from tests.sglang.engines import engine
from tests.sglang.interpreted import LAUNCHED, InterpretedEngine

pytestmark = pytest.mark.sglang

SMALL = {"num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_value_head_dim": 16, "num_experts": 4}
"""Little of what the interpreter takes time for, programs."""
SMALLER = SMALL | {"num_hidden_layers": 2, "full_attention_interval": 2, "mlp_only_layers": [0]}
PROMPTS = ((7, 3, 11), tuple(range(20, 86)))
"""Less than a chunk of the delta rule, and more."""
MAX_TOKENS = 5
INTERPRETED: dict[str, Any] = {
    "engine_class": InterpretedEngine,
    "max_running_requests": 2,
    "skip_server_warmup": True,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("small") / "checkpoint", agreement=1.0, **SMALL)


@pytest.mark.parametrize("drafts", [0, 2])
def test_greedy_tokens_equal_those_of_transformers_in_float32(
    checkpoint: Path, drafts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "launched"
    monkeypatch.setenv(LAUNCHED, str(file))
    with engine(checkpoint, drafts=drafts, **INTERPRETED) as running:
        tokens = running.greedy(PROMPTS, MAX_TOKENS)
    assert tokens == [reference.greedy(checkpoint, prompt, MAX_TOKENS) for prompt in PROMPTS]
    assert {"recurrent_kernel", "chunk_kernel", "state_kernel"} <= set(file.read_text().split())
    seen = running.drafts
    assert 0 < seen.accepted < seen.drafted if drafts else not seen.drafted


def test_in_the_deterministic_mode_a_request_has_the_same_bits_however_it_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and beside another, which cuts it elsewhere; generated with drafts and prefilled."""
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", agreement=1.0, **SMALLER)
    file = tmp_path / "launched"
    monkeypatch.setenv(LAUNCHED, str(file))
    monkeypatch.setenv("QNEXT_DETERMINISTIC", "1")
    request, other = Request(tuple(range(20, 29))), Request((7, 3))
    with engine(checkpoint, dtype="bfloat16", drafts=2, chunked_prefill_size=6, **INTERPRETED) as running:
        (answer,) = running.answers([request], 3)
        assert running.answers([other, request], 3)[1:] == [answer]
        longer, rest = answer.behind(request, 2)
        assert running.answers([longer], 1) == [rest]
    assert 0 < running.drafts.accepted < running.drafts.drafted
    kernels = set(file.read_text().split())
    assert {"walk_kernel", "up_kernel"} <= kernels
    assert not {"chunk_kernel", "state_kernel"} & kernels


def test_shared_expert_of_the_size_of_the_others_is_computed_along_and_the_tokens_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_size = {"shared_expert_intermediate_size": 32, "mlp_only_layers": []}
    # Little agreement: here the tokens change where the shared expert does.
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", agreement=0.1, **SMALL, **same_size)
    file = tmp_path / "launched"
    monkeypatch.setenv(LAUNCHED, str(file))
    with engine(checkpoint, drafts=2, **INTERPRETED) as running:
        tokens = running.greedy(PROMPTS, MAX_TOKENS)
    assert tokens == [reference.greedy(checkpoint, prompt, MAX_TOKENS) for prompt in PROMPTS]
    launched = file.read_text().split()
    assert "up_kernel" in launched
    assert "silu_and_mul_kernel" not in launched, "an MLP has run on its own"


@pytest.mark.slow
def test_experts_in_fp8_are_ours_the_shared_one_too_and_give_the_tokens_of_the_unquantized_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The head of this checkpoint leaves wide gaps between its logits.
    sizes = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "mlp_only_layers": []}
    checkpoint = write_random_checkpoint(tmp_path / "fp8", agreement=1.0, **SMALL, **sizes)
    expected = [reference.greedy(checkpoint, prompt, MAX_TOKENS) for prompt in PROMPTS]
    quantize_experts(checkpoint)
    file = tmp_path / "launched"
    monkeypatch.setenv(LAUNCHED, str(file))
    with engine(checkpoint, dtype="bfloat16", **INTERPRETED) as running:
        assert running.greedy(PROMPTS, MAX_TOKENS) == expected
    launched = file.read_text().split()
    assert "quantize_kernel" in launched
    assert "silu_and_mul_kernel" not in launched, "an MLP has run on its own"
