#!/usr/bin/env python3
"""Serve the tiny checkpoint with SGLang and this plugin, talk to it, and print what was measured.

python examples/demo_sglang.py              what `make demo-sglang` runs
python examples/demo_sglang.py --compare    the same once more without speculation

Ends with status 1 and one sentence if anything is not as it should be.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.serving_demo import CONTEXT, DemoError, EngineServer, Metrics, main


class Server(EngineServer):
    engine = "SGLang"
    prefix_cache = "radix cache"
    draft_tokens = 3
    settings = ("--context-length", str(CONTEXT), "--enable-metrics")
    speculation = (
        *("--speculative-algorithm", "NEXTN", "--speculative-num-steps", str(draft_tokens)),
        *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(1 + draft_tokens)),
    )
    draft_architecture = "Qwen3NextForCausalLMMTP"
    log_name = "demo-sglang.log"
    # The lines of its web server are our own questions whether it is ready.
    log_message = re.compile(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[^]]*\] (?!INFO:)(?P<message>\S.*)")

    def launcher(self, checkpoint: Path) -> list[str]:
        if find_spec("sglang") is None:
            raise DemoError(f"there is no SGLang beside {sys.executable}: run `make demo-sglang`.")
        return [sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint), "--device", "cpu"]

    def interrupt(self) -> None:
        # Its helpers get none: it would take their end for a crash.
        self.process.terminate()

    def read_metrics(self, counter: Callable[..., int]) -> Metrics:
        drafts = accepted = 0
        if self.speculative:
            drafts = counter("sglang:spec_verify_calls_total")
            # Each verification gives the accepted drafts and one token of the model's own.
            accepted = counter("sglang:realtime_tokens_total", mode="decode") - drafts
        cached = counter("sglang:prefill_effective_tokens_total", mode="device_hit")
        return Metrics(drafts, drafts * self.draft_tokens, accepted, cached)


if __name__ == "__main__":
    sys.exit(main(Server, __doc__))
