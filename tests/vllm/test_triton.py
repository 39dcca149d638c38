"""A real engine on the kernels for GPUs, interpreted: the greedy tokens of the C++ kernels, with and without drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import reference
from tests.checkpoints import quantize_experts, write_random_checkpoint
from tests.vllm.engines import printed_by
from tests.vllm.greedy_on_triton import MAX_TOKENS, PROMPTS

pytestmark = pytest.mark.vllm

SMALL = {"num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_value_head_dim": 16, "num_experts": 4}
"""Little of what the interpreter takes time for, programs."""
SMALLER = SMALL | {"num_hidden_layers": 2, "full_attention_interval": 2, "mlp_only_layers": [0]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("small") / "checkpoint", agreement=1.0, **SMALL)


def run(checkpoint: Path, drafts: int, dtype: str) -> dict[str, Any]:
    return printed_by("greedy_on_triton", str(checkpoint), str(drafts), dtype)


@pytest.mark.parametrize("drafts", [0, 2])
def test_greedy_tokens_equal_those_of_the_native_kernels_in_float32(checkpoint: Path, drafts: int) -> None:
    answer = run(checkpoint, drafts, "float32")
    assert {"recurrent_kernel", "chunk_kernel", "state_kernel"} <= set(answer["kernels"])
    assert answer["triton"] == answer["native"]
    assert [len(tokens) for tokens in answer["triton"]] == [MAX_TOKENS] * len(PROMPTS)
    accepted, drafted = answer["drafts"]
    assert 0 < accepted < drafted if drafts else not drafted


def test_shared_expert_of_the_size_of_the_others_is_computed_along_and_the_tokens_are_those_of_transformers(
    tmp_path: Path,
) -> None:
    same_size = {"shared_expert_intermediate_size": 32, "mlp_only_layers": []}
    # Little agreement: here the tokens change where the shared expert does.
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", agreement=0.1, **SMALL, **same_size)
    answer = run(checkpoint, 2, "float32")
    assert "up_kernel" in answer["kernels"]
    assert "silu_and_mul_kernel" not in answer["kernels"], "an MLP has run on its own"
    expected = [list(reference.greedy(checkpoint, prompt, MAX_TOKENS)) for prompt in PROMPTS]
    assert answer["triton"] == expected
    assert answer["native"] == expected


def test_in_the_deterministic_mode_a_request_has_the_same_bits_however_it_is_served(tmp_path: Path) -> None:
    """Alone and beside another, which cuts it elsewhere; generated with drafts and prefilled."""
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", agreement=1.0, **SMALLER)
    answer = printed_by("deterministic_on_triton", str(checkpoint), QNEXT_DETERMINISTIC="1")
    assert answer["same"] == {"among": True, "prefilled": True}
    accepted, drafted = answer["drafts"]
    assert 0 < accepted < drafted
    assert {"walk_kernel", "up_kernel"} <= set(answer["kernels"])
    assert not {"chunk_kernel", "state_kernel"} & set(answer["kernels"])


@pytest.mark.slow
def test_experts_in_fp8_are_ours_the_shared_one_too_and_give_the_tokens_of_the_cpu_backend(tmp_path: Path) -> None:
    # Rounding differs between the two, but the head of this checkpoint leaves wide gaps between its logits.
    sizes = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "mlp_only_layers": []}
    checkpoint = write_random_checkpoint(tmp_path / "fp8", agreement=1.0, **SMALL, **sizes)
    quantize_experts(checkpoint)
    answer = run(checkpoint, 0, "bfloat16")
    assert "quantize_kernel" in answer["kernels"]
    assert "silu_and_mul_kernel" not in answer["kernels"], "an MLP has run on its own"
    assert answer["triton"] == answer["native"]
