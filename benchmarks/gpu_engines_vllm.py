"""vLLM in a process of its own: one side of ``gpu_engines.py``."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Any

from gpu_engines_serving import Answer, Counters, Serving, Tokens, model_folder, random_weights
from torch import Tensor, nn
from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

RANDOM = "random_slice"


@register_model_loader(RANDOM)
class RandomLoader(DefaultModelLoader):
    """Loads random weights as if they stood in files."""

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Generator[tuple[str, Tensor], None, None]:
        yield from random_weights(model_config.hf_text_config)


class WorkerExtension:
    """Has the worker's process import this module, and with it the loader."""


class RunningEngine:
    """The engine, as the process that holds it is asked."""

    def __init__(self, serving: Serving) -> None:
        with model_folder(serving) as folder:
            self.llm = LLM(folder, **arguments(serving))

    def answers(self, prompts: Sequence[Tokens], max_tokens: int, read: bool) -> list[Answer]:
        outputs = self._generate(prompts, max_tokens, logprobs=0, prompt_logprobs=0 if read else None)
        return [_answer(output) for output in outputs]

    def seconds(self, prompts: Sequence[Tokens], max_tokens: int) -> float:
        start = time.perf_counter()
        self._generate(prompts, max_tokens)
        return time.perf_counter() - start

    def forget(self) -> None:
        self.llm.reset_prefix_cache()

    def counters(self) -> Counters:
        values = {metric.name: getattr(metric, "value", 0) for metric in self.llm.get_metrics()}
        names = ("prefix_cache_hits", "spec_decode_num_drafts", "spec_decode_num_accepted_tokens")
        return Counters(*(int(values.get(f"vllm:{name}", 0)) for name in names))

    def shutdown(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def _generate(self, prompts: Sequence[Tokens], max_tokens: int, **options: Any) -> list[RequestOutput]:
        parameters = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **options
        )
        inputs = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        return self.llm.generate(inputs, parameters, use_tqdm=False)


def arguments(serving: Serving) -> dict[str, Any]:
    """What vLLM's ``LLM`` is told beside the folder."""
    given: dict[str, Any] = {
        "dtype": serving.dtype,
        "enforce_eager": serving.eager,
        "max_model_len": serving.max_tokens,
        "max_num_seqs": serving.requests,
        "kv_cache_memory_bytes": serving.cache_bytes,
        "skip_tokenizer_init": True,
        "disable_log_stats": not serving.counted,
    }
    if serving.checkpoint is None:
        given |= {"load_format": RANDOM, "worker_extension_cls": f"{__name__}.{WorkerExtension.__name__}"}
    if serving.device == "cuda":
        # vLLM wants this share free at its start, where the other engine may be; the cache's size is given above.
        given["gpu_memory_utilization"] = 0.05
    if serving.drafts:
        given["speculative_config"] = {"method": "qwen3_next_mtp", "num_speculative_tokens": serving.drafts}
    return given | serving.options


def _answer(output: RequestOutput) -> Answer:
    (completion,) = output.outputs
    tokens = tuple(completion.token_ids)
    given = tuple(entry[token].logprob for token, entry in zip(tokens, completion.logprobs, strict=True))
    prompt = output.prompt_token_ids[1:], (output.prompt_logprobs or [None])[1:]
    read = tuple(entry[token].logprob for token, entry in zip(*prompt, strict=False))
    return Answer(tokens, given, read)
