"""A request with a seed whose prompt is prefilled in pieces, which on a CPU ends vLLM's engine.

vLLM samples behind every piece, drops the token, and takes the draw back by the offset of the request's generator,
which those of CPUs do not have. Here such a request is sampled without its generator, so that nothing is drawn from it.
"""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def withhold_generators() -> None:
    """Wrap the sampling of vLLM's model runner for CPUs; on a GPU, where generators have an offset, nothing is done."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.sample_tokens

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        generators = self.input_batch.generators
        unfinished = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
        withheld = {request: generators.pop(request) for request in unfinished if request in generators}
        try:
            return original(self, grammar_output)
        finally:
            generators.update(withheld)

    CPUModelRunner.sample_tokens = sample_tokens
