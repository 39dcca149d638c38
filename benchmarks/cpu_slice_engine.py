"""A vLLM engine in a process of its own that is told, step by step, what to run: one side of ``cpu_slice.py``."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from qnext_plugins.cli.bench.models import Slice
from qnext_plugins.cli.bench.stepped import EngineProcess


@dataclass(frozen=True)
class Side:
    """How one engine is started."""

    name: str
    plugin: bool
    drafts: int = 0
    """Draft tokens of n-gram lookup, which costs next to nothing: what is timed is the verify step."""
    eager: bool = False
    fp8: bool = False
    int4: int | None = None
    int8: bool = False
    max_tokens: int = 40_000
    chunk: int = 2048
    """Tokens of a prefill step at most."""


class Engine(EngineProcess):
    """The handle of a started engine."""

    side: Side

    @classmethod
    def start(cls, side: Side, model: Slice, threads: int, log: Path) -> Self:
        """Start ``side`` on ``model``, with at most so many threads."""
        settings = {
            "side": side,
            "config": replace(model, fp8=side.fp8, int4=side.int4, int8=side.int8).config(),
            "threads": threads,
        }
        engine = cls.spawn(side.name, log, f"{__name__}:RunningEngine", settings)
        engine.side = side
        return engine

    def prefill(self, prompt: list[int], threads: int) -> float:
        """Begin a request; seconds until its first token."""
        return self.ask("prefill", prompt, threads)

    def steps(self, count: int, threads: int) -> list[tuple[float, int]]:
        """Go on with it; of each step its seconds and how many tokens it gave."""
        return self.ask("steps", count, threads)

    def finish(self) -> None:
        """Abort the request."""
        self.ask("finish")

    def constant(self) -> None:
        """From now on every token is token 0, so that all of the n-gram's drafts of a prompt of zeros are accepted."""
        self.ask("constant")


class RunningEngine:
    """The engine itself, in the process that runs its steps."""

    def __init__(self, side: Side, config: dict[str, Any], threads: int) -> None:
        os.environ |= {
            "QNEXT_DISABLE": "0" if side.plugin else "1",
            "QNEXT_STRICT": "1" if side.plugin else "0",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(threads),
        }
        from vllm import LLM, SamplingParams

        ngram = {"method": "ngram", "num_speculative_tokens": side.drafts, "prompt_lookup_min": 1}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            self.llm = LLM(
                folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype="bfloat16",
                enforce_eager=side.eager,
                max_model_len=side.max_tokens,
                max_num_batched_tokens=side.chunk,
                max_num_seqs=4,
                kv_cache_memory_bytes=1 << 30,
                speculative_config=ngram if side.drafts else None,
            )
        self.parameters = SamplingParams(temperature=0.0, max_tokens=side.max_tokens, ignore_eos=True, detokenize=False)
        self.requests = 0
        self.tokens = 0

    def prefill(self, prompt: list[int], threads: int) -> float:
        self._use(threads)
        self.requests, self.tokens = self.requests + 1, 0
        self.name = str(self.requests)
        start = time.perf_counter()
        self.llm.llm_engine.add_request(self.name, {"prompt_token_ids": prompt}, self.parameters)
        while self._step()[1] == 0:
            pass
        return time.perf_counter() - start

    def steps(self, count: int, threads: int) -> list[tuple[float, int]]:
        self._use(threads)
        return [self._step() for _ in range(count)]

    def finish(self) -> None:
        self.llm.llm_engine.abort_request([self.name])
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()

    def constant(self) -> None:
        self.llm.apply_model(_zero_the_last_norm)

    def _step(self) -> tuple[float, int]:
        start = time.perf_counter()
        outputs = self.llm.llm_engine.step()
        seconds = time.perf_counter() - start
        before = self.tokens
        self.tokens = max([len(output.outputs[0].token_ids) for output in outputs], default=before)
        return seconds, self.tokens - before

    @staticmethod
    def _use(threads: int) -> None:
        import torch

        # vLLM puts a function that does nothing in the place of torch.set_num_threads.
        torch._C.set_num_threads(threads)


def _zero_the_last_norm(model: Any) -> None:
    """The norm multiplies by 1 + weight: all logits become 0, and the first token is the answer."""
    model.model.norm.weight.data.fill_(-1.0)
