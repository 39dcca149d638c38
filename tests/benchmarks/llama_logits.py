"""Logits of llama.cpp on tensors of a checkpoint; runs in llama.cpp's environment with ``benchmarks`` in PYTHONPATH.

    llama_logits.py TYPE STEPS WEIGHTS.npz CONFIG.json TOKENS.json OUT.npz

TYPE is that of linears and experts in the file.

All tokens but the last STEPS go in at once, those one by one, as a prompt and its continuation do.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from cpu_slice_engine import Side
from cpu_slice_gguf import write
from cpu_slice_llama import RunningLlama


def logits_of(engine: RunningLlama, tokens: list[int], first: int, vocabulary: int) -> np.ndarray:
    """[tokens, vocabulary]"""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for row, token in enumerate(tokens):
        batch.token[row], batch.pos[row] = token, first + row
        batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, 0, True
    assert llama_cpp.llama_decode(engine.context, batch) == 0
    values = llama_cpp.llama_get_logits(engine.context)
    array = np.ctypeslib.as_array(ctypes.cast(values, ctypes.POINTER(ctypes.c_float)), (len(tokens), vocabulary)).copy()
    llama_cpp.llama_batch_free(batch)
    return array


def main() -> None:
    stored, steps = sys.argv[1], int(sys.argv[2])
    weights, config_file, tokens_file, out = map(Path, sys.argv[3:])
    config, tokens = json.loads(config_file.read_text()), json.loads(tokens_file.read_text())
    arrays = np.load(weights)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write(path, config, lambda name, shape: arrays[name].reshape(shape), stored)
        engine = RunningLlama(path, Side("llama.cpp", plugin=False, max_tokens=512, chunk=512), threads=1)
    prompt, rest = tokens[:-steps], tokens[-steps:]
    rows = [logits_of(engine, prompt, 0, config["vocab_size"])]
    rows += [logits_of(engine, [token], len(prompt) + n, config["vocab_size"]) for n, token in enumerate(rest)]
    engine.finish()
    # The steps that the benchmark times, from the same prompt.
    engine.prefill(prompt, 1)
    greedy = [engine.token]
    for _ in range(steps - 1):
        engine.steps(1, 1)
        greedy.append(engine.token)
    np.savez(out, logits=np.concatenate(rows), greedy=greedy)


if __name__ == "__main__":
    main()
