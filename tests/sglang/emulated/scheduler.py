"""SGLang's scheduler on the emulated device, in this process, asked for greedy tokens.

    python -m tests.sglang.emulated.scheduler CHECKPOINT '{"rounds": [[[7, 3], [5]]], "max_tokens": 4}'

``rounds`` are prompts that are asked for together, one round behind the other; what else is given goes to SGLang's
``ServerArgs``. The last line has the tokens of every round, and what was seen, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from typing import Any

import psutil

os.environ |= {
    "TRITON_INTERPRET": "1",
    "TORCHDYNAMO_DISABLE": "1",
    # These load libraries that ask for a driver.
    "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
}
from tests.sglang.emulated import cuda

cuda.install()
from tests.sglang.emulated import kernels  # noqa: E402

kernels.install()
from tests.sglang.emulated import graphs  # noqa: E402

graphs.install()
graphs.install_in_sglang()
from sglang.srt.managers.io_struct import ShutdownReq, TokenizedGenerateReqInput  # noqa: E402
from sglang.srt.managers.scheduler import run_scheduler_process  # noqa: E402
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer  # noqa: E402
from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402
from sglang.srt.server_args import PortArgs, ServerArgs  # noqa: E402


class Client:
    """Takes the place of the tokenizer's process: asks one round after the other, then ends the scheduler."""

    def __init__(self, rounds: list[list[list[int]]], max_tokens: int) -> None:
        self.rounds, self.max_tokens, self.asked = rounds, max_tokens, 0
        self.finished: dict[str, Any] = {}

    def receive(self) -> list[Any]:
        """What has arrived since the scheduler last asked."""
        if any(f"{self.asked - 1}.{n}" not in self.finished for n in range(len(self._asked()))):
            return []
        if self.asked == len(self.rounds):
            return [ShutdownReq()]
        self.asked += 1
        return [self._request(f"{self.asked - 1}.{n}", prompt) for n, prompt in enumerate(self._asked())]

    def _asked(self) -> list[list[int]]:
        return self.rounds[self.asked - 1] if self.asked else []

    def _request(self, name: str, prompt: list[int]) -> TokenizedGenerateReqInput:
        sampling = SamplingParams(max_new_tokens=self.max_tokens, temperature=0.0, ignore_eos=True)
        sampling.normalize(None)
        return TokenizedGenerateReqInput(
            rid=name,
            input_text="",
            input_ids=array("q", prompt),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=sampling,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=False,
        )

    def answered(self, requests: list[Any]) -> None:
        self.finished |= {request.rid: request for request in requests if request.finished()}

    def seen(self) -> dict[str, Any]:
        """Tokens and counters of all rounds."""
        answers = [[self.finished[f"{n}.{k}"] for k in range(len(asked))] for n, asked in enumerate(self.rounds)]
        requests = [request for answer in answers for request in answer]
        return {
            "tokens": [[list(request.output_ids)[: self.max_tokens] for request in answer] for answer in answers],
            "cached": sum(request.cached_tokens for request in requests),
            "steps": sum(request.spec_verify_ct for request in requests),
            "accepted": sum(request.spec_num_correct_drafts for request in requests),
            "replays": graphs.CUDAGraph.replays,
            "prefills": graphs.CUDAGraph.prefills,
        }


class Ready:
    """Takes the place of the engine, which waits for the scheduler to be there."""

    def send(self, information: Any) -> None: ...


def main() -> None:
    options = json.loads(sys.argv[2])
    client, launched = Client(options.pop("rounds"), options.pop("max_tokens")), set[str]()
    stream = SchedulerOutputStreamer.stream_output

    def stream_output(self: Any, reqs: list[Any], *args: Any, **kwargs: Any) -> None:
        client.answered(reqs)
        stream(self, reqs, *args, **kwargs)

    # A scheduler that ends with an error also ends the process that started it.
    psutil.Process.send_signal = cuda.always()
    SchedulerRequestReceiver._pull_raw_reqs = lambda self: client.receive()
    SchedulerOutputStreamer.stream_output = stream_output
    server_args = ServerArgs(model_path=sys.argv[1], device="cuda", **options)
    server_args.resolve_once()
    with kernels.interpreting(launched):
        run_scheduler_process(server_args, PortArgs.init_new(server_args), 0, 0, 0, None, Ready())
    print(json.dumps(client.seen() | {"launched": sorted(launched)}), flush=True)


if __name__ == "__main__":
    main()
