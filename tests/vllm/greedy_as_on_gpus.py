"""`python -m tests.vllm.greedy_as_on_gpus CHECKPOINT DRAFTS`: greedy tokens of a model put together as on several GPUs.

Projections are joined, and norms are in vLLM's own operators; here with C++ kernels and one rank. The engine must run
in this very process (VLLM_ENABLE_V1_MULTIPROCESSING=0), where the engine's side can be told so. The second answers come
after the weights have been loaded again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from qnext_vllm import engine as our_engine
from qnext_vllm import model
from tests import reference
from tests.vllm.engines import engine


def main(checkpoint: Path, drafts: int) -> None:
    our_engine.joins = lambda device, sizes, ranks: True
    our_engine.VllmEngine.norm = lambda self, size, eps: our_engine.VisibleRMSNorm(size, eps)
    model.stacks_layers = lambda vllm_config: False
    prompts = reference.prompts(checkpoint)[::2]
    with engine(checkpoint, drafts=drafts, eager=False) as running:
        names = [name for names in running.llm.apply_model(parameter_names) for name in names]
        answers = [running.greedy(prompts)]
        running.llm.collective_rpc("reload_weights")
        running.llm.reset_prefix_cache()
        answers.append(running.greedy(prompts))
    print(json.dumps({"parameters": names, "answers": answers}))


def parameter_names(module: model.Qwen3NextForCausalLM) -> list[str]:
    return [name for name, _ in module.named_parameters()]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
