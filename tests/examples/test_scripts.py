"""The examples that need no server: the kernels by hand, and transformers' model on them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3NextForCausalLM

from examples.transformers_generate import generate, our_kernels
from tests.checkpoints import TINY

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module", params=["tiny", "random"])
def model(request: pytest.FixtureRequest) -> Qwen3NextForCausalLM:
    checkpoint = request.getfixturevalue(f"{request.param}_checkpoint")
    return Qwen3NextForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def prompt(model: Qwen3NextForCausalLM, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, model.config.vocab_size, shape, generator=generator)


def test_kernels_alone_writes_the_slots_that_it_names() -> None:
    done = run("kernels_alone.py")
    assert done.returncode == 0, done.stderr
    assert "prefilled (164, 32, 128), decoded (2, 32, 128)" in done.stdout
    assert "slots written: [2, 5]" in done.stdout


@pytest.mark.parametrize("length", [1, 3, 64, 130])
def test_tokens_are_those_of_transformers(model: Qwen3NextForCausalLM, length: int) -> None:
    theirs = generate(model, prompt(model, 1, length), 24).tokens
    with our_kernels(model):
        assert generate(model, prompt(model, 1, length), 24).tokens == theirs
    assert generate(model, prompt(model, 1, length), 24).tokens == theirs, "and transformers' layers come back"


@torch.inference_mode()
def test_a_padded_batch_without_and_with_a_cache_has_the_logits_of_transformers(model: Qwen3NextForCausalLM) -> None:
    ids, mask = prompt(model, 3, 40), torch.ones(3, 40, dtype=torch.int64)
    mask[0, :7] = mask[2, :39] = 0
    real = mask.bool()
    theirs = model(ids, attention_mask=mask, use_cache=False).logits[real]
    with our_kernels(model):
        for use_cache in (False, True):
            ours = model(ids, attention_mask=mask, use_cache=use_cache).logits[real]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


@torch.inference_mode()
def test_a_prefill_in_pieces_has_the_logits_of_one(model: Qwen3NextForCausalLM) -> None:
    ids = prompt(model, 2, 90)
    with our_kernels(model):
        whole = model(ids).logits
        cache, pieces = None, []
        for piece in ids.split([30, 50, 1, 9], dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=2e-3)


def test_transformers_generate_reports_the_same_tokens_on_the_tiny_checkpoint() -> None:
    done = run("transformers_generate.py", str(TINY), "--prompt-tokens", "100", "--new-tokens", "12")
    assert done.returncode == 0, done.stderr
    assert "tokens: the same" in done.stdout
    assert "gated_delta_rule=native" in done.stdout


@pytest.mark.slow
def test_transformers_generate_reports_the_same_tokens_at_real_widths() -> None:
    done = run("transformers_generate.py", "--experts", "10", "--prompt-tokens", "200", "--new-tokens", "6")
    assert done.returncode == 0, done.stderr
    assert "tokens: the same" in done.stdout


@pytest.mark.parametrize("arguments", [["no/such/folder"], ["--dtype", "float16"], ["--layers", "3"]])
def test_bad_arguments_are_refused_by_name(arguments: list[str]) -> None:
    done = run("transformers_generate.py", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert arguments[0] in done.stderr
