"""A vLLM engine in a process of its own that is told, step by step, what to run: one side of ``cpu_slice.py``."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_SECONDS = 900


@dataclass(frozen=True)
class Slice:
    """Some layers of Qwen3-Next-80B-A3B at their real widths, with fewer experts."""

    layers: int = 4
    experts: int = 256
    vocabulary: int = 151936
    hidden: int = 2048
    intermediate: int = 512

    def config(self) -> dict[str, Any]:
        """What ``config.json`` says."""
        return {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": 5120,
            "num_hidden_layers": self.layers,
            "full_attention_interval": 4,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "attention_bias": False,
            "partial_rotary_factor": 0.25,
            "rope_theta": 10_000_000.0,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "num_experts": self.experts,
            "num_experts_per_tok": 10,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": self.intermediate,
            "shared_expert_intermediate_size": self.intermediate,
            "max_position_embeddings": 262144,
            "tie_word_embeddings": False,
            "eos_token_id": 0,
        }


@dataclass(frozen=True)
class Side:
    """How one engine is started."""

    name: str
    plugin: bool
    drafts: int = 0
    """Draft tokens of n-gram lookup, which costs next to nothing: what is timed is the verify step."""
    eager: bool = False
    max_tokens: int = 40_000
    chunk: int = 2048
    """Tokens of a prefill step at most."""


class EngineError(RuntimeError):
    """An engine could not be started, or ended."""


class Engine:
    """The handle of a started engine."""

    def __init__(self, side: Side, model: Slice, threads: int, log: Path) -> None:
        self.side, self.log = side, log
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, asdict(side), model.config(), threads, str(log))
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it has started; raises EngineError."""
        self._receive(START_SECONDS)

    def prefill(self, prompt: list[int], threads: int) -> float:
        """Begin a request; seconds until its first token."""
        return self._ask("prefill", prompt, threads)

    def steps(self, count: int, threads: int) -> list[tuple[float, int]]:
        """Go on with it; of each step its seconds and how many tokens it gave."""
        return self._ask("steps", count, threads)

    def finish(self) -> None:
        """Abort the request."""
        self._ask("finish")

    def constant(self) -> None:
        """From now on every token is token 0, so that all of the n-gram's drafts of a prompt of zeros are accepted."""
        self._ask("constant")

    def stop(self) -> None:
        self._process.kill()
        self._process.join()

    def _ask(self, *command: Any) -> Any:
        self._connection.send(command)
        return self._receive(1800)

    def _receive(self, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while not self._connection.poll(1):
            if not self._process.is_alive() or time.monotonic() > deadline:
                raise EngineError(f"{self.side.name}: the engine ended or hangs; see {self.log}")
        try:
            kind, value = self._connection.recv()
        except EOFError:
            raise EngineError(f"{self.side.name}: the engine ended; see {self.log}") from None
        if kind == "error":
            raise EngineError(f"{self.side.name}: {value}; see {self.log}")
        return value


def _serve(connection: Connection, side: dict[str, Any], config: dict[str, Any], threads: int, log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    serve(connection, lambda: _RunningEngine(Side(**side), config, threads))


def serve(connection: Connection, start: Callable[[], Any]) -> None:
    """Start an engine and call its methods as :class:`Engine` asks, until it is gone."""
    try:
        engine = start()
        connection.send(("started", None))
        while True:
            name, *arguments = connection.recv()
            connection.send(("done", getattr(engine, name)(*arguments)))
    except EOFError:
        return
    except Exception as error:
        connection.send(("error", str(error).splitlines()[0] if str(error) else repr(error)))
        raise


class _RunningEngine:
    """The engine itself, in the process that runs its steps."""

    def __init__(self, side: Side, config: dict[str, Any], threads: int) -> None:
        os.environ |= {
            "QNEXT_DISABLE": "0" if side.plugin else "1",
            "QNEXT_STRICT": "1" if side.plugin else "0",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(threads),
        }
        from vllm import LLM, SamplingParams

        ngram = {"method": "ngram", "num_speculative_tokens": side.drafts, "prompt_lookup_min": 1}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            self.llm = LLM(
                folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype="bfloat16",
                enforce_eager=side.eager,
                max_model_len=side.max_tokens,
                max_num_batched_tokens=side.chunk,
                max_num_seqs=4,
                kv_cache_memory_bytes=1 << 30,
                speculative_config=ngram if side.drafts else None,
            )
        self.parameters = SamplingParams(temperature=0.0, max_tokens=side.max_tokens, ignore_eos=True, detokenize=False)
        self.requests = 0
        self.tokens = 0

    def prefill(self, prompt: list[int], threads: int) -> float:
        self._use(threads)
        self.requests, self.tokens = self.requests + 1, 0
        self.name = str(self.requests)
        start = time.perf_counter()
        self.llm.llm_engine.add_request(self.name, {"prompt_token_ids": prompt}, self.parameters)
        while self._step()[1] == 0:
            pass
        return time.perf_counter() - start

    def steps(self, count: int, threads: int) -> list[tuple[float, int]]:
        self._use(threads)
        return [self._step() for _ in range(count)]

    def finish(self) -> None:
        self.llm.llm_engine.abort_request([self.name])
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()

    def constant(self) -> None:
        self.llm.apply_model(_zero_the_last_norm)

    def _step(self) -> tuple[float, int]:
        start = time.perf_counter()
        outputs = self.llm.llm_engine.step()
        seconds = time.perf_counter() - start
        before = self.tokens
        self.tokens = max([len(output.outputs[0].token_ids) for output in outputs], default=before)
        return seconds, self.tokens - before

    @staticmethod
    def _use(threads: int) -> None:
        import torch

        # vLLM puts a function that does nothing in the place of torch.set_num_threads.
        torch._C.set_num_threads(threads)


def _zero_the_last_norm(model: Any) -> None:
    """The norm multiplies by 1 + weight: all logits become 0, and the first token is the answer."""
    model.model.norm.weight.data.fill_(-1.0)
