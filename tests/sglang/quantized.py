"""A quantized checkpoint, and an engine's answers beside those of transformers on what its numbers mean."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from qnext_plugins.model import CheckpointError, Qwen3NextConfig, check_files, expected_shapes
from qnext_sglang.cpu.platform import CpuPlatform
from qnext_sglang.quantization import shapes_on_cpu
from tests import reference
from tests.determinism import Requests, alone, among
from tests.reference import Tokens, first_difference
from tests.sglang.engines import Engine

MAX_TOKENS = 24


class Checkpoints(NamedTuple):
    quantized: Path
    float32: Path
    """The same weights, dequantized."""

    @property
    def prompts(self) -> tuple[Tokens, ...]:
        return reference.prompts(self.float32)[::4]

    def quant_config(self) -> Any:
        """What SGLang on our platform makes of the checkpoint's."""
        stored = json.loads((self.quantized / "config.json").read_text())["quantization_config"]
        return CpuPlatform().get_quantization_config(stored["quant_method"]).from_config(stored)

    def first_difference(self, running: Engine, prompts: tuple[Tokens, ...]) -> str | None:
        """Between an engine's greedy tokens and transformers'."""
        expected = [reference.greedy(self.float32, prompt, MAX_TOKENS) for prompt in prompts]
        return first_difference(expected, running.greedy(prompts, MAX_TOKENS))

    def expect_tokens_of_transformers(self, running: Engine) -> None:
        """Raise AssertionError unless an engine gives them, batched, alone and with a prefix from the cache."""
        assert self.first_difference(running, self.prompts) is None
        for prompt in self.prompts[::3]:
            assert self.first_difference(running, (prompt,)) is None
        assert running.cached_tokens > 0

    def expect_answers_follow(self, running: Engine, names: Iterable[str]) -> None:
        """Raise AssertionError unless answers are others while any of these tensors is another."""
        before = running.greedy(self.prompts, MAX_TOKENS)
        with safe_open(self.quantized / "model.safetensors", "pt") as file:
            for name in names:
                stored = file.get_tensor(name)
                running.update(name, -stored if stored.is_floating_point() else ~stored)
                assert running.greedy(self.prompts, MAX_TOKENS) != before, name
                running.update(name, stored)
        assert running.greedy(self.prompts, MAX_TOKENS) == before

    def expect_independent_and_close(self, running: Engine) -> None:
        """Raise AssertionError unless an answer is the same alone and among others, as close as transformers' own."""
        requests = Requests.of(reference.prompts(self.float32))
        expected = alone(running, requests.greedy)
        assert among(running, requests.greedy, requests.others) == expected
        results = running.greedy_with_log_probs(self.prompts, MAX_TOKENS)
        assert reference.bfloat16_error_ratio(self.float32, self.prompts, results) < 1.3

    def expect_missing_is_named(self, gone: str, folder: Path) -> None:
        """Raise AssertionError unless a tensor that is not there is named from the headers of the files."""
        config = Qwen3NextConfig.from_hf(AutoConfig.from_pretrained(self.quantized))
        shapes = shapes_on_cpu(self.quant_config(), expected_shapes(config, mtp=True))
        assert shapes is not None
        check_files(self.quantized, shapes)
        copy = shutil.copytree(self.quantized, folder / "copy")
        weights = load_file(copy / "model.safetensors")
        del weights[gone]
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"missing {gone}$"):
            check_files(copy, shapes)
