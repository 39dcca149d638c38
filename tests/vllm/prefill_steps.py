"""`python -m tests.vllm.prefill_steps CHECKPOINT LENGTHS OPTIONS`: in which steps vLLM runs prompts, as JSON.

Options are those of ``tests.vllm.engines.engine``, in JSON.

The engine must run in this very process (VLLM_ENABLE_V1_MULTIPROCESSING=0), where its scheduler can be watched.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.vllm.engines import Engine, engine

MAX_TOKENS = 4


def prompt_of(length: int) -> tuple[int, ...]:
    """A prompt of that many tokens; each begins with the shorter ones."""
    return tuple(5 + 7 * n * n % 400 for n in range(length))


def recorded_steps(running: Engine) -> list[list[int]]:
    """How many tokens of each request vLLM schedules in every step from now on."""
    scheduler, steps = running.llm.llm_engine.engine_core.engine_core.scheduler, []
    schedule = scheduler.schedule

    def record(*args: Any, **options: Any) -> Any:
        output = schedule(*args, **options)
        if output.num_scheduled_tokens:
            steps.append(list(output.num_scheduled_tokens.values()))
        return output

    scheduler.schedule = record
    return steps


def main(checkpoint: Path, lengths: list[int], options: dict[str, Any]) -> None:
    runs = []
    with engine(checkpoint, **options) as running:
        steps = recorded_steps(running)
        for length in lengths:
            running.llm.reset_prefix_cache()
            for cached in (False, True):
                steps.clear()
                tokens = running.greedy([prompt_of(length)], MAX_TOKENS)[0]
                runs.append({"length": length, "cached": cached, "steps": list(steps), "tokens": tokens})
    print(json.dumps(runs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]))
