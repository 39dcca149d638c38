#!/usr/bin/env python3
"""Compare vLLM, SGLang and transformers on the tiny checkpoint in float32, both engines with their drafts.

python examples/compare_tiny.py                             what `make compare` runs
python examples/compare_tiny.py --html build/compare.html   any option of `qnext compare`
python examples/compare_tiny.py --engine vllm               without SGLang's environment

The environments are those of QNEXT_VLLM_PYTHON and QNEXT_SGLANG_PYTHON, else the one that runs this.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import typer

from qnext_plugins.cli.compare.command import compare

CHECKPOINT = Path(__file__).resolve().parent / "tiny" / "checkpoint"
CONTEXT = "2048"
# Flags that suit any CPU: by default vLLM reserves most of the machine's memory, and compiles for a minute.
VLLM = ["--max-model-len", CONTEXT, "--kv-cache-memory-bytes", "256M", "--enforce-eager"]
VLLM_DRAFTS = ["--speculative-config", '{"method": "qwen3_next_mtp", "num_speculative_tokens": 2}']
SGLANG = ["--device", "cpu", "--context-length", CONTEXT]
SGLANG_DRAFTS = ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", "3", "--speculative-eagle-topk", "1"]
SGLANG_DRAFTS += ["--speculative-num-draft-tokens", "4"]


def sides(checkpoint: Path, engines: list[str], *, drafts: bool = True) -> list[str]:
    """The sides of a comparison on ``checkpoint``, with flags for a CPU; transformers is the last."""
    flags = {
        "vllm": [*VLLM, *(VLLM_DRAFTS if drafts else [])],
        "sglang": [*SGLANG, *(SGLANG_DRAFTS if drafts else [])],
        "hf": [],
    }
    return [f"{engine}:{shlex.join([str(checkpoint), *flags[engine]])}" for engine in [*engines, "hf"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=("vllm", "sglang"), help="one engine, instead of both")
    args, options = parser.parse_known_args()
    app = typer.Typer()
    app.command()(compare)
    app([*sides(CHECKPOINT, args.engine or ["vllm", "sglang"]), "--dtype", "float32", *options])


if __name__ == "__main__":
    main()
