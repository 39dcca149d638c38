"""Serves a checkpoint with transformers alone, so that the official implementation is asked like an engine.

python referee.py MODEL --port 8000 [--dtype float32] [--device cpu] [--threads 2]

The part of the OpenAI interface that a comparison needs, with vLLM's extensions: greedy completions and chats with
token ids and log-probabilities, and ``prompt_logprobs``, which ``prompt_logprobs_dtype`` asks for in another dtype than
the model's; one request at a time, nothing streamed. The script imports nothing of this package: it runs in whatever
environment has torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

BEST = 2
DTYPES = ("float32", "bfloat16", "float16")


class RequestError(ValueError):
    """One line about a request that cannot be served."""


class CheckpointError(ValueError):
    """One line about a checkpoint that cannot referee."""


class Referee:
    """A model in transformers with its tokenizer."""

    def __init__(self, name: str, dtype: str, device: str) -> None:
        """Load it; raises CheckpointError if it lacks tensors, for which transformers would take random ones."""
        self.name = name
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = self.load(dtype)
        self.models = {self.dtype: self.model}
        self.lock = threading.Lock()

    def load(self, dtype: str) -> Any:
        model: Any
        model, loaded = AutoModelForCausalLM.from_pretrained(self.name, dtype=dtype, output_loading_info=True)
        if missing := sorted(loaded["missing_keys"]):
            raise CheckpointError(
                f"{self.name}: the checkpoint lacks {len(missing)} of the model's tensors, the first is {missing[0]}"
            )
        return model.to(self.device).eval()

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def model_in(self, dtype: str) -> Any:
        """The model in ``dtype``, loaded beside the others when it is first asked for; raises RequestError."""
        if dtype not in DTYPES:
            raise RequestError(f"prompt_logprobs_dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        if dtype not in self.models:
            needed = self.model.num_parameters() * getattr(torch, dtype).itemsize
            if needed > (free := free_memory(self.device)):
                raise RequestError(
                    f"the model in {dtype} takes {needed / 1e9:.2g} GB, and {free / 1e9:.2g} GB are free"
                )
            self.models[dtype] = self.load(dtype)
        return self.models[dtype]

    def about(self) -> dict[str, str]:
        return {
            "version": transformers.__version__,
            "dtype": self.dtype,
        }

    def card(self) -> dict[str, str]:
        return {"id": self.name, "object": "model", "owned_by": "transformers"}

    def prompt_ids(self, request: dict[str, Any]) -> list[int]:
        """The tokens of a request's prompt or messages."""
        if "messages" in request:
            text = self.tokenizer.apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        prompt = request.get("prompt")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not isinstance(ids, list) or not ids or not all(isinstance(token, int) for token in ids):
            raise RequestError(f"prompt: expected a text or a list of token ids, not empty, got {str(prompt)[:60]!r}")
        return ids

    @torch.inference_mode()
    def greedy(self, prompt: list[int], max_tokens: int, *, ignore_eos: bool) -> tuple[list[int], Tensor]:
        """The greedy continuation and the float32 log-probabilities [tokens, vocabulary] it was taken from."""
        ids = torch.tensor([prompt], device=self.model.device)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **({"eos_token_id": None} if ignore_eos else {}),
        )
        tokens = output.sequences[0, len(prompt) :].tolist()
        return tokens, torch.stack([logits[0] for logits in output.logits]).float().log_softmax(dim=-1)

    @torch.inference_mode()
    def read(self, ids: list[int], dtype: str) -> Tensor:
        """Float32 log-probabilities [tokens - 1, vocabulary] of each token after the first; ``dtype``: the model's."""
        model = self.model_in(dtype)
        logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits
        return logits[0, :-1].float().log_softmax(dim=-1)

    def complete(self, request: dict[str, Any], *, chat: bool) -> dict[str, Any]:
        """The answer to a request of /v1/completions or /v1/chat/completions; raises RequestError."""
        if request.get("stream") or request.get("temperature", 0) != 0:
            raise RequestError("the referee serves greedy requests (temperature 0) and does not stream")
        max_tokens = request.get("max_tokens", 16)
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise RequestError(f"max_tokens: expected a positive number, got {max_tokens!r}")
        prompt = self.prompt_ids(request)
        with self.lock:
            ids, log_probs = self.greedy(prompt, max_tokens, ignore_eos=bool(request.get("ignore_eos")))
            read = None
            if request.get("prompt_logprobs") is not None and len(prompt) > 1:
                read = self.read(prompt, request.get("prompt_logprobs_dtype") or self.dtype)
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "length" if len(ids) == max_tokens else "stop",
            "token_ids": ids,
            "prompt_token_ids": prompt,
        }
        if request.get("logprobs"):
            choice["logprobs"] = (self.chat_log_probs if chat else self.log_probs)(ids, log_probs)
        if request.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = [None, *(self.scored(prompt[1:], read) if read is not None else [])]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids), "total_tokens": len(prompt) + len(ids)}
        return {"object": "completion", "model": self.name, "choices": [choice], "usage": usage}

    def best(self, log_probs: Tensor) -> list[list[tuple[int, float]]]:
        """The best tokens with their log-probabilities, of each row."""
        values, tokens = log_probs.topk(BEST)
        rows = zip(tokens.tolist(), values.tolist(), strict=True)
        return [list(zip(*row, strict=True)) for row in rows]

    def log_probs(self, ids: list[int], log_probs: Tensor) -> dict[str, Any]:
        tops = [{self.tokenizer.decode([token]): value for token, value in row} for row in self.best(log_probs)]
        return {
            "tokens": [self.tokenizer.decode([token]) for token in ids],
            "token_logprobs": [float(log_probs[position, token]) for position, token in enumerate(ids)],
            "top_logprobs": tops,
        }

    def chat_log_probs(self, ids: list[int], log_probs: Tensor) -> dict[str, Any]:
        content = []
        for position, (token, row) in enumerate(zip(ids, self.best(log_probs), strict=True)):
            tops = [{"token": self.tokenizer.decode([other]), "logprob": value} for other, value in row]
            logprob = float(log_probs[position, token])
            content.append({"token": self.tokenizer.decode([token]), "logprob": logprob, "top_logprobs": tops})
        return {"content": content}

    def scored(self, ids: list[int], log_probs: Tensor) -> list[dict[str, Any]]:
        """For each of ``ids`` the best tokens and itself, as vLLM writes them."""
        entries = []
        for position, (token, row) in enumerate(zip(ids, self.best(log_probs), strict=True)):
            entry = {str(other): {"logprob": value, "rank": rank} for rank, (other, value) in enumerate(row, start=1)}
            entry.setdefault(str(token), {"logprob": float(log_probs[position, token])})
            entries.append(entry)
        return entries


def free_memory(device: str) -> float:
    """Bytes that are free where the model computes; without end where that cannot be told."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf


class Handler(BaseHTTPRequestHandler):
    """Answers with JSON; the referee is an attribute of the subclass that ``main`` makes."""

    referee: Referee
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        pages: dict[str, Any] = {
            "/health": {},
            "/version": self.referee.about(),
            "/v1/models": {"object": "list", "data": [self.referee.card()]},
        }
        page = pages.get(self.path)
        self.answer(404 if page is None else 200, {"error": f"no such page: {self.path}"} if page is None else page)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chat = self.path == "/v1/chat/completions"
        if not chat and self.path != "/v1/completions":
            self.answer(404, {"error": f"no such page: {self.path}"})
            return
        try:
            self.answer(200, self.referee.complete(json.loads(body), chat=chat))
        except ValueError as error:
            self.answer(400, {"error": {"message": str(error)}})
        except Exception as error:
            # Whatever transformers raises ends this request, not the server.
            self.answer(500, {"error": {"message": f"{type(error).__name__}: {error}"}})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        print(format % args, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch; by default one a core")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        referee = Referee(args.model, args.dtype, args.device)
    except CheckpointError as error:
        parser.exit(1, f"error: {error}\n")
    handler = type("BoundHandler", (Handler,), {"referee": referee})
    server = ThreadingHTTPServer((args.host, args.port), handler)
    print(f"transformers {transformers.__version__} serves {args.model} in {referee.dtype}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
