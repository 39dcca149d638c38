"""SGLang in a process of its own: one side of ``gpu_engines.py``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import sglang
from gpu_engines_serving import STATE_SLOTS, Answer, Counters, Serving, Tokens, model_folder, random_weights
from sglang.srt.model_loader.loader import DefaultModelLoader
from torch import Tensor, nn


class RandomLoader(DefaultModelLoader):
    """Loads random weights as if they stood in files."""

    def _get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        yield from random_weights(model_config.hf_text_config)


class RunningEngine:
    """The engine, as the process that holds it is asked."""

    def __init__(self, serving: Serving) -> None:
        self.counted = Counters(0, 0, 0)
        with model_folder(serving) as folder:
            self.engine = sglang.Engine(model_path=folder, **arguments(serving))
        # SGLang lets fewer run at once where its pools have no room for more, and says so in its log alone.
        (state,) = self.engine.get_server_info()["internal_states"]
        if (running := state["effective_max_running_requests_per_dp"]) < serving.requests:
            raise RuntimeError(
                f"SGLang runs {running} requests at once, not {serving.requests}: its pools are too small"
            )

    def answers(self, prompts: Sequence[Tokens], max_tokens: int, read: bool) -> list[Answer]:
        return [
            Answer(
                tuple(result["output_ids"]), *(_log_probs(result["meta_info"], kind) for kind in ("output", "input"))
            )
            for result in self._generate(prompts, max_tokens, return_logprob=True, logprob_start_len=0 if read else -1)
        ]

    def seconds(self, prompts: Sequence[Tokens], max_tokens: int) -> float:
        start = time.perf_counter()
        self._generate(prompts, max_tokens)
        return time.perf_counter() - start

    def forget(self) -> None:
        self.engine.flush_cache()

    def counters(self) -> Counters:
        return self.counted

    def shutdown(self) -> None:
        self.engine.shutdown()

    def _generate(self, prompts: Sequence[Tokens], max_tokens: int, **options: Any) -> list[dict[str, Any]]:
        parameters = {"temperature": 0.0, "max_new_tokens": max_tokens, "ignore_eos": True}
        ids = [list(prompt) for prompt in prompts]
        results = self.engine.generate(input_ids=ids, sampling_params=parameters, **options)
        for meta in (result["meta_info"] for result in results):
            seen = (meta["cached_tokens"], meta.get("spec_verify_ct", 0), meta.get("spec_num_correct_drafts", 0))
            self.counted = Counters(*(before + more for before, more in zip(self.counted, seen, strict=True)))
        return results


def arguments(serving: Serving) -> dict[str, Any]:
    """What SGLang's ``Engine`` is told beside the folder."""
    given: dict[str, Any] = {
        "dtype": serving.dtype,
        "context_length": serving.max_tokens,
        "max_running_requests": serving.requests,
        "max_total_tokens": serving.cache_tokens,
        "max_mamba_cache_size": STATE_SLOTS * serving.requests,
        "skip_tokenizer_init": True,
        "log_level": "info",  # with the plugin's line that it serves
    }
    if serving.checkpoint is None:
        given["load_format"] = RandomLoader
    if serving.device == "cpu":
        given["device"] = "cpu"
    else:
        # Of what is free at its start, where the other engine may be; the pools' sizes are given above.
        given["mem_fraction_static"] = 0.9
        if serving.dtype == "float32":
            given["attention_backend"] = "triton"  # the others have no float32
        if serving.eager:
            given["disable_cuda_graph"] = True
    if serving.drafts:
        given |= {
            "speculative_algorithm": "NEXTN",
            "speculative_num_steps": serving.drafts,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": serving.drafts + 1,
        }
    return given | serving.options


def _log_probs(meta: dict[str, Any], kind: str) -> tuple[float, ...]:
    """Of the tokens that were generated ("output") or of the prompt's but its first ("input")."""
    entries = meta.get(f"{kind}_token_logprobs") or []
    return tuple(log_prob for log_prob, _, _ in entries if log_prob is not None)
