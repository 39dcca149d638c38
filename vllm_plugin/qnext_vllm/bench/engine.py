"""A vLLM engine that is told step by step what to run, with its decoder layers or without them."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class NoLayers(nn.Module):
    """In the place of a model's decoder layers: what an engine's step costs without them."""

    def __init__(self, tokens: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden = torch.randn(tokens, hidden).to(dtype)

    def forward(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """[T, hidden]: the same at every call."""
        return self.hidden[: input_ids.shape[0]]


class SteppedEngine:
    """A slice in vLLM, in this process.

    The tokens before those that are timed are fed with the layers left out: their keys, values and states are random
    numbers, and the time of what follows is the same.
    """

    def __init__(
        self,
        config: dict[str, Any],
        threads: int,
        chunk: int,
        max_tokens: int,
        batch: int,
        cache_bytes: int,
        eager: bool,
    ) -> None:
        """``config``: of a Hugging Face ``config.json``; ``chunk``: tokens of a step of prefill."""
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(threads)}
        from vllm import LLM, SamplingParams

        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            self.llm = LLM(
                folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype="bfloat16",
                enforce_eager=eager,
                enable_prefix_caching=False,
                async_scheduling=False,
                max_model_len=max_tokens,
                max_num_batched_tokens=chunk,
                max_num_seqs=batch,
                kv_cache_memory_bytes=cache_bytes,
            )
        self.chunk = chunk
        self.parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self.requests: list[str] = []
        self.started = 0
        (runner,) = self.llm.collective_rpc(lambda worker: worker.model_runner)
        self.model, self.layers = runner.model, runner.model.model
        self.none = NoLayers(chunk, config["hidden_size"], torch.bfloat16)
        _fill(runner.kv_caches)
        # vLLM puts a function that does nothing in the place of torch.set_num_threads.
        torch._C.set_num_threads(threads)

    def architecture(self) -> str:
        """Which class serves: ``module.class``."""
        return f"{type(self.model).__module__}.{type(self.model).__qualname__}"

    def prefill(self, offset: int, with_layers: bool) -> float:
        """Seconds of the step that reads the last ``chunk`` tokens of a prompt, behind ``offset`` others."""
        with self._without_layers():
            self._begin(1, offset + self.chunk)
            for _ in range(offset // self.chunk):
                self._step()
        try:
            if with_layers:
                return self._step()
            with self._without_layers():
                return self._step()
        finally:
            self._finish()

    def begin_decode(self, batch: int, context: int) -> None:
        """Prompts of ``context`` tokens, read with the layers left out, up to the first token of each."""
        with self._without_layers():
            self._begin(batch, context)
            waiting = set(self.requests)
            while waiting:
                waiting -= {output.request_id for output in self.llm.llm_engine.step()}

    def decode(self, steps: int, with_layers: bool) -> list[float]:
        """Seconds of each of so many steps of all sequences."""
        if with_layers:
            return [self._step() for _ in range(steps)]
        with self._without_layers():
            return [self._step() for _ in range(steps)]

    def end_decode(self) -> None:
        self._finish()

    def _begin(self, batch: int, tokens: int) -> None:
        for _ in range(batch):
            self.started += 1
            name = str(self.started)
            prompt = {"prompt_token_ids": [1 + n % 1000 for n in range(tokens)]}
            self.llm.llm_engine.add_request(name, prompt, self.parameters)
            self.requests.append(name)

    def _finish(self) -> None:
        self.llm.llm_engine.abort_request(self.requests)
        self.requests = []
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()

    def _step(self) -> float:
        start = time.perf_counter()
        self.llm.llm_engine.step()
        return time.perf_counter() - start

    @contextmanager
    def _without_layers(self) -> Iterator[None]:
        self.model.model = self.none
        try:
            yield
        finally:
            self.model.model = self.layers


def _fill(caches: Any) -> None:
    """Random numbers into every cache: memory that was never written is one page of zeros, which a processor keeps."""
    for cache in caches:
        if isinstance(cache, list | tuple):
            _fill(cache)
        else:
            numbers = (torch.randn(4093) * 0.1).to(cache.dtype)
            cache.copy_(numbers.repeat(-(-cache.numel() // 4093))[: cache.numel()].view(cache.shape))
