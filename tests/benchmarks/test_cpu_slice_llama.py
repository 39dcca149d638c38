"""The llama.cpp that ``cpu_slice.py`` measures computes the model: the same logits and tokens as transformers.

Runs where QNEXT_LLAMA_PYTHON names the Python of an environment with llama-cpp-python and gguf.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from qnext_plugins.cli.bench.models import Slice
from tests.model.transformers_models import small_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROMPT = 70
"""More than a chunk of the chunked delta rule."""
STEPS = 8
QUANTIZED = (
    *(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "out", "gate", "up", "down")),
    *("in_proj_qkvz.weight", "experts.gate_up_proj", "experts.down_proj"),
)
"""How the names of the weights end that are not in bfloat16 in a file of another type."""


@pytest.fixture(scope="module")
def python() -> str:
    given = os.environ.get("QNEXT_LLAMA_PYTHON")
    if not given:
        pytest.skip("QNEXT_LLAMA_PYTHON: expected the Python of an environment with llama-cpp-python and gguf")
    return given


@pytest.fixture(scope="module")
def config(python: str) -> dict[str, Any]:
    """The benchmark's, with heads of real sizes, but narrow and of few experts."""
    model = Slice(layers=4, experts=8, vocabulary=512, hidden=256, intermediate=64)
    return model.config() | {"num_experts_per_tok": 3}


@pytest.fixture(scope="module")
def model(config: dict[str, Any]) -> Qwen3NextForCausalLM:
    """float32, with values that bfloat16 can hold."""
    known = Qwen3NextConfig(**{key: value for key, value in config.items() if key != "torch_dtype"})
    return small_model(known).bfloat16().float()


@pytest.fixture(scope="module")
def tokens(model: Qwen3NextForCausalLM) -> Tensor:
    """[1, T]: a prompt and what the model says after it."""
    prompts = torch.randint(1, 512, (16, PROMPT), generator=torch.Generator().manual_seed(0))
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    said = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=STEPS, **options)
    best, second = torch.stack(said.logits, dim=1).topk(2, dim=-1).values.unbind(-1)
    # The prompt whose closest decision is the clearest, so that roundings change none.
    clearest = int((best - second).amin(dim=1).argmax())
    return said.sequences[clearest : clearest + 1]


@pytest.fixture(scope="module")
def ask(
    python: str,
    config: dict[str, Any],
    model: Qwen3NextForCausalLM,
    tokens: Tensor,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], dict[str, np.ndarray]]:
    """llama.cpp's logits [T, V] and greedy tokens, from linears and experts of a type."""
    folder = tmp_path_factory.mktemp("llama")
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    bits = {name: weight.view(torch.uint16).numpy() for name, weight in weights.items()}
    np.savez(folder / "weights.npz", **bits)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokens.json").write_text(json.dumps(tokens[0].tolist()))
    files = [str(folder / name) for name in ("weights.npz", "config.json", "tokens.json", "out.npz")]
    script = str(Path(__file__).with_name("llama_logits.py"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [BENCHMARKS, BENCHMARKS.parent]))}

    def answer(stored: str) -> dict[str, np.ndarray]:
        command = [python, script, stored, str(STEPS), *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        return dict(np.load(files[-1]))

    return answer


@pytest.fixture(scope="module")
def answer(ask: Callable[[str], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return ask("BF16")


def test_its_process_needs_neither_pytorch_nor_pydantic() -> None:
    """They are not in llama.cpp's environment."""
    script = "import sys; sys.modules |= {'torch': None, 'pydantic': None}; import cpu_slice_engine"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@torch.no_grad()
def test_logits_of_llama_cpp_are_as_near_the_references_as_bfloat16_allows(
    model: Qwen3NextForCausalLM, tokens: Tensor, answer: dict[str, np.ndarray]
) -> None:
    exact = model(tokens).logits[0]
    rounded = copy.deepcopy(model).bfloat16()(tokens).logits[0].float()
    theirs = torch.from_numpy(answer["logits"])
    # llama.cpp rounds what enters a product to bfloat16, transformers in bfloat16 all that it computes.
    error, allowed = (theirs - exact).norm(dim=1), (rounded - exact).norm(dim=1)
    assert error.median() <= allowed.median()
    assert error.max() <= 2 * allowed.max()


@torch.no_grad()
def test_greedy_tokens_of_llama_cpp_are_the_references(tokens: Tensor, answer: dict[str, np.ndarray]) -> None:
    assert answer["greedy"].tolist() == tokens[0, PROMPT:].tolist()


@torch.no_grad()
def test_blocks_of_four_and_eight_bits_are_linears_and_experts_alone(
    model: Qwen3NextForCausalLM, tokens: Tensor, ask: Callable[[str], dict[str, np.ndarray]]
) -> None:
    quantized = copy.deepcopy(model)
    for name, weight in quantized.named_parameters():
        if name.endswith(QUANTIZED):
            weight.copy_(in_q4_0(weight))
    exact, of_four_bits = model(tokens).logits[0], quantized(tokens).logits[0]
    four, eight = (torch.from_numpy(ask(stored)["logits"]) for stored in ("Q4_0", "Q8_0"))
    # llama.cpp rounds activations to eight bits too: that is little beside weights of four.
    assert (four - of_four_bits).norm() < (four - exact).norm() / 4
    assert (eight - exact).norm() < (four - exact).norm() / 4


def in_q4_0(weight: Tensor) -> Tensor:
    """Each 32 columns as multiples −8 … 7 of a scale in float16, of which the largest number is −8."""
    blocks = weight.unflatten(-1, (-1, 32))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = (largest / -8).half().float()
    return ((blocks / scale + 8.5).floor().clamp(0, 15).sub(8) * scale).flatten(-2)
