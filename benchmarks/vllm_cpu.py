#!/usr/bin/env python3
"""vLLM on this CPU with the plugin and without: the same random checkpoint, bfloat16, eager, alternating engines.

    python benchmarks/vllm_cpu.py [--rounds 2]

Both engines run in turn, `--rounds` times; the best of all rounds counts. vLLM's own model needs DeltaNet head
dimensions of 128 and bfloat16, so the checkpoint has them. Prints tokens/s and the ratio ours / in-tree, with machine
and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    "hidden_size": 256,
    "head_dim": 64,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
# name: (prompts, tokens a prompt, new tokens a prompt, whether the prompts or the new tokens are counted)
CASES = {
    "decode, 1 sequence": (1, 16, 128, "new"),
    "decode, 8 sequences": (8, 16, 64, "new"),
    "prefill, 4 × 512 tokens": (4, 512, 1, "prompt"),
}


def measure(checkpoint: str) -> dict[str, float]:
    """Tokens/s of every case in a fresh engine; the plugin serves unless QNEXT_DISABLE is set."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(checkpoint, dtype="bfloat16", enforce_eager=True, max_model_len=1024, kv_cache_memory_bytes=512 << 20)
    rng, rates = random.Random(0), {}
    for name, (count, length, new, counted) in CASES.items():
        parameters = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        seconds = []
        for _ in range(4):
            prompts = [TokensPrompt(prompt_token_ids=rng.choices(range(1, 2000), k=length)) for _ in range(count)]
            start = time.perf_counter()
            llm.generate(prompts, parameters, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
        rates[name] = count * (new if counted == "new" else length) / min(seconds[1:])
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="engines a side (default 2)")
    parser.add_argument("--measure", metavar="CHECKPOINT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print("RATES " + json.dumps(measure(args.measure)))
        return 0

    sys.path.insert(0, str(ROOT))
    from tests.checkpoints import write_random_checkpoint

    console = Console()
    best: dict[str, dict[str, float]] = {"ours": {}, "in-tree": {}}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_random_checkpoint(Path(folder) / "checkpoint", **SIZES)
        for turn in range(args.rounds):
            for side in best:
                console.print(f"round {turn + 1} of {args.rounds}, {side}", style="dim")
                environment = {**os.environ, "QNEXT_DISABLE": "1" if side == "in-tree" else "0"}
                command = [sys.executable, __file__, "--measure", str(checkpoint)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                line = next((line for line in done.stdout.splitlines() if line.startswith("RATES ")), None)
                if line is None:
                    console.print(done.stdout[-3000:] + done.stderr[-3000:], markup=False)
                    return 1
                for name, rate in json.loads(line.removeprefix("RATES ")).items():
                    best[side][name] = max(rate, best[side].get(name, 0.0))
    cores = len(os.sched_getaffinity(0))
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.split(": ")[1].strip() for line in info if line.startswith("model name"))
    versions = f"vllm-cpu {version('vllm-cpu')}, torch {version('torch')}, Python {platform.python_version()}"
    table = Table(title=f"tokens/s, {cpu}, {cores} cores; {versions}")
    for column in ("case", "ours", "in-tree", "ratio"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name in CASES:
        ours, theirs = best["ours"][name], best["in-tree"][name]
        table.add_row(name, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
