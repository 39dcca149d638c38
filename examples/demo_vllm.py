#!/usr/bin/env python3
"""Serve the tiny checkpoint with `vllm serve` and this plugin, talk to it, and print what was measured.

python examples/demo_vllm.py              what `make demo` runs
python examples/demo_vllm.py --compare    the same once more without speculation

Ends with status 1 and one sentence if anything is not as it should be.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.serving_demo import CONTEXT, DemoError, EngineServer, Metrics, main


class Server(EngineServer):
    engine = "vLLM"
    prefix_cache = "prefix cache"
    draft_tokens = 2
    # An explicit cache size: by default vLLM reserves most of the machine's memory.
    settings = ("--max-model-len", str(CONTEXT), "--kv-cache-memory-bytes", "256M")
    speculation = ("--speculative-config", f'{{"method":"qwen3_next_mtp","num_speculative_tokens":{draft_tokens}}}')
    draft_architecture = "Qwen3NextMTP"
    log_name = "demo.log"
    log_message = re.compile(r"INFO \d\d-\d\d \d\d:\d\d:\d\d \[[^]]+\] (?P<message>\S.*)")

    def launcher(self, checkpoint: Path) -> list[str]:
        vllm = Path(sys.executable).with_name("vllm")
        if not vllm.exists():
            raise DemoError(f"there is no vllm beside {sys.executable}: run `make demo`.")
        return [str(vllm), "serve", str(checkpoint)]

    def read_metrics(self, counter: Callable[..., int]) -> Metrics:
        names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
        drafts, drafted, accepted = (
            counter(f"vllm:spec_decode_{name}_total") if self.speculative else 0 for name in names
        )
        return Metrics(drafts, drafted, accepted, cached=counter("vllm:prefix_cache_hits_total"))


if __name__ == "__main__":
    sys.exit(main(Server, __doc__))
