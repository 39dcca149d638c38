#!/usr/bin/env python3
"""What the deterministic mode costs in the engine of this environment: with it and without it, in turns.

    python benchmarks/deterministic_cost.py examples/tiny/checkpoint [--requests 24] [--tokens 64] [--turns 7]

Four engines on the same checkpoint are in memory at once, started without the mode, with it, with it and without it,
since one that was started earlier may be slower. They answer the same requests in turns, and the median of a turn
counts. Prompts differ from turn to turn, so that none comes from the prefix cache. The last line says whether the
backends are the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qnext_kernels.dispatch import deterministic, selected_backends

GREEDY, SAMPLED = {"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}
PROMPT_TOKENS = 64
ORDER = (False, True, True, False)
"""Whether the mode is on in each engine, as they are started."""


@dataclass(frozen=True)
class Workload:
    """What the requests of a turn ask for."""

    name: str
    top_log_probs: int | None
    half_sample: bool = False

    def parameters(self, requests: int) -> list[dict[str, float]]:
        return [SAMPLED if self.half_sample and n % 2 else GREEDY for n in range(requests)]


WORKLOADS = (
    Workload("greedy", None),
    Workload("greedy, 5 top log-probabilities", 5),
    Workload("half sample, 5 top log-probabilities", 5, half_sample=True),
)
Answer = Callable[[Sequence[list[int]], Workload, int], None]


def start_vllm(model: str) -> tuple[Answer, Callable[[], None]]:
    from vllm import LLM, SamplingParams, TokensPrompt

    options: dict[str, Any] = {"max_model_len": 1024, "kv_cache_memory_bytes": 256 << 20, "enforce_eager": True}
    engine = LLM(model, dtype="bfloat16", **options)

    def answer(prompts: Sequence[list[int]], workload: Workload, tokens: int) -> None:
        common = {"max_tokens": tokens, "ignore_eos": True, "logprobs": workload.top_log_probs}
        parameters = [SamplingParams(**common, **own) for own in workload.parameters(len(prompts))]
        engine.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], parameters, use_tqdm=False)

    return answer, lambda: engine.llm_engine.engine_core.shutdown()


def start_sglang(model: str) -> tuple[Answer, Callable[[], None]]:
    import sglang

    engine = sglang.Engine(
        model_path=model, device="cpu", dtype="bfloat16", context_length=1024, max_running_requests=32
    )

    def answer(prompts: Sequence[list[int]], workload: Workload, tokens: int) -> None:
        common = {"max_new_tokens": tokens, "ignore_eos": True}
        parameters = [common | own for own in workload.parameters(len(prompts))]
        top = workload.top_log_probs
        engine.generate(
            input_ids=list(prompts),
            sampling_params=parameters,
            return_logprob=top is not None,
            top_logprobs_num=top or 0,
        )

    return answer, engine.shutdown


def measure(engines: Sequence[Answer], workload: Workload, args: argparse.Namespace) -> list[float]:
    """Median seconds of a turn without the mode and with it."""
    generator = random.Random(0)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(args.turns + 1):
        prompts = [[generator.randrange(2, 1000) for _ in range(PROMPT_TOKENS)] for _ in range(args.requests)]
        for on, answer in zip(ORDER, engines, strict=True):
            start = time.perf_counter()
            answer(prompts, workload, args.tokens)
            if turn:  # the first warms up
                seconds[on].append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder of a checkpoint")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    name = "vllm" if importlib.util.find_spec("vllm") else "sglang"
    start = {"vllm": start_vllm, "sglang": start_sglang}[name]
    engines, ends = [], []
    try:
        for on in ORDER:
            os.environ["QNEXT_DETERMINISTIC"] = str(int(on))
            answer, end = start(args.model)
            engines.append(answer)
            ends.append(end)
        table = Table(
            "workload", "off, s", "on, s", "on / off", title=f"{name}, {args.requests} × {args.tokens} tokens"
        )
        for workload in WORKLOADS:
            off, on = measure(engines, workload, args)
            table.add_row(workload.name, f"{off:.3f}", f"{on:.3f}", f"{on / off:.3f}")
    finally:
        for end in ends:
            end()
    kernels = []
    for on in (False, True):
        with deterministic(on):
            kernels.append(selected_backends(torch.device("cpu"), torch.bfloat16))
    Console().print(table, f"backends with the mode: {'the same' if kernels[0] == kernels[1] else kernels}")


if __name__ == "__main__":
    main()
