#!/usr/bin/env python3
"""Train a tiny Qwen3-Next with its multi-token-prediction head on the Python reference, on a CPU.

The text is `pydoc_data.topics`, which every Python carries. The result is a checkpoint in the layout of the published
ones (experts one by one, grouped DeltaNet projections, `mtp.*`), small enough to live in a repository and good enough
that speculative decoding accepts a realistic share of its drafts.

    python train.py                       # train, write ./checkpoint, evaluate
    python train.py --evaluate-only       # evaluate the checkpoint that is there

Shapes in docstrings: B rows, S positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import trange
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3NextConfig, Qwen3NextForCausalLM
from transformers import logging as transformers_logging
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextDecoderLayer,
    Qwen3NextRMSNorm,
    load_balancing_loss_func,
)

HELD_OUT = ("assert", "context-managers", "global", "numeric-types", "raise", "shifting", "truth", "while")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOOL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HEADING = re.compile(r"^(?P<title>\S.*)\n[*=\-~]{3,}\n+", re.MULTILINE)
QUESTIONS = ("What is {}?", "Explain {}.", "Tell me about {}.", "How does {} work in Python?", "What are {}?")
HERE = Path(__file__).resolve().parent
SYSTEM = "You are a helpful assistant."
LOOKUP_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look a topic up in the Python reference.",
        "parameters": {"type": "object", "properties": {"topic": {"type": "string"}}, "required": ["topic"]},
    },
}


def split_corpus() -> tuple[dict[str, str], dict[str, str]]:
    """The topics to train on and those held out, as name to text.

    Topics quote one another whole, so a paragraph of a held-out topic also leaves every topic that is trained on.
    """
    held_out = {name: topics[name] for name in HELD_OUT if name in topics}
    # Short paragraphs ("Changed in version 3.8.", a table rule) are common phrases, not quotations.
    unseen = {part.strip() for text in held_out.values() for part in text.split("\n\n") if len(part) > 60}
    train = {
        name: "\n\n".join(part for part in text.split("\n\n") if part.strip() not in unseen)
        for name, text in sorted(topics.items())
        if name not in held_out
    }
    return train, held_out


def sections(corpus: dict[str, str], limit: int = 450) -> dict[str, str]:
    """What chats are about: each topic name and each heading, with the first paragraphs below it."""
    found: dict[str, str] = {}
    for name, text in corpus.items():
        headings = [*HEADING.finditer(text)]
        for index, heading in enumerate(headings):
            end = headings[index + 1].start() if index + 1 < len(headings) else len(text)
            answer = ""
            for paragraph in text[heading.end() : end].strip().split("\n\n"):
                if answer and len(answer) + len(paragraph) > limit:
                    break
                answer += ("\n\n" if answer else "") + paragraph
            if len(answer) > 60:
                found.setdefault(heading["title"], answer)
                if index == 0:
                    found.setdefault(f"`{name}`", answer)
    return found


def conversations(subjects: dict[str, str], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Arguments of `apply_chat_template` for `count` chats; some have a system message, two turns or a tool call."""
    names = sorted(subjects)
    chats: list[dict[str, Any]] = []
    for _ in range(count):
        messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.4 else []
        kind = rng.random()
        for subject in rng.sample(names, 2 if kind > 0.8 else 1):
            answer = {"role": "assistant", "content": subjects[subject]}
            if kind < 0.12:
                call = {"function": {"name": "lookup", "arguments": {"topic": subject.strip("`")}}}
                messages += [
                    {"role": "user", "content": f"Look up {subject}."},
                    {"role": "assistant", "content": "", "tool_calls": [call]},
                    {"role": "tool", "content": subjects[subject]},
                    answer,
                ]
            else:
                messages += [{"role": "user", "content": rng.choice(QUESTIONS).format(subject)}, answer]
        chats.append({"conversation": messages, "tools": [LOOKUP_TOOL] if kind < 0.12 else None})
    return chats


def make_tokenizer(texts: list[str], settings: dict[str, Any], folder: Path) -> PreTrainedTokenizerBase:
    """Train the byte-level BPE, write its files into `folder` and load them again as a user would."""
    added = [*SPECIAL_TOKENS, *TOOL_TOKENS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings["vocab_size"] - len(added),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TOOL_TOKENS])
    if tokenizer.get_vocab_size() != settings["vocab_size"]:
        raise ValueError(f"the text gives {tokenizer.get_vocab_size()} tokens, not {settings['vocab_size']}")
    tokenizer.save(str(folder / "tokenizer.json"))
    # Written by hand: the class name that transformers 5 would write is unknown to earlier releases.
    description = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": settings["max_position_embeddings"],
        "chat_template": (HERE / "chat_template.jinja").read_text().rstrip("\n"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(description, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(folder)


class DraftKeys:
    """Stands where the attention layer expects its cache and keeps the keys of every earlier draft step."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor]] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Add one step's [B, heads, S, D] and return the keys and values of all steps, [B, heads, steps * S, D]."""
        self.steps.append((key, value))
        keys, values = zip(*self.steps, strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


class MultiTokenPredictor(nn.Module):
    """The `mtp.*` part of a checkpoint; embedding and language-model head are the target's."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.pre_fc_norm_embedding = Qwen3NextRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_fc_norm_hidden = Qwen3NextRMSNorm(config.hidden_size, config.rms_norm_eps)
        attention_layer = config.layer_types.index("full_attention")
        self.layers = nn.ModuleList([Qwen3NextDecoderLayer(config, attention_layer)])
        self.norm = Qwen3NextRMSNorm(config.hidden_size, config.rms_norm_eps)

    def drafts(
        self, target: Qwen3NextForCausalLM, hidden: Tensor, following: Tensor, depth: int, teacher: bool
    ) -> list[Tensor]:
        """Logits of `depth` draft steps from every position at once, each [B, S, V].

        `hidden` [B, S, H] is the target's final-norm output and `following` [B, S] the token after each position.
        Step j at position p belongs to the draft that starts at t = p - j and predicts token p + 2, so its first j
        positions mean nothing. As in an engine, such a draft sees the first step's keys up to t, because those are
        rewritten from verified tokens, and its own later keys at t + 1 .. p. With `teacher`, later steps read the
        text's tokens, otherwise the drafted ones.
        """
        size = hidden.shape[1]
        position = torch.arange(size)
        rotary = target.model.rotary_emb(hidden, position[None])
        cache, results = DraftKeys(), list[Tensor]()
        distance = position[:, None] - position[None, :]
        for step in range(depth):
            if step:
                hidden = F.pad(hidden[:, :-1], (0, 0, 1, 0))
                if not teacher:
                    following = F.pad(results[-1][:, :-1].argmax(-1), (1, 0))
            visible = [distance >= step] + [distance == step - own for own in range(1, step + 1)]
            embedded = self.pre_fc_norm_embedding(target.model.embed_tokens(following))
            hidden = self.layers[0](
                self.fc(torch.cat([embedded, self.pre_fc_norm_hidden(hidden)], dim=-1)),
                position_embeddings=rotary,
                attention_mask=torch.cat(visible, dim=1)[None, None],
                past_key_values=cache,
            )
            hidden = self.norm(hidden)
            results.append(target.lm_head(hidden))
        return results


def to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fused expert tensors [experts, out, in] apart, one tensor per expert; bfloat16 but for the DeltaNet decay."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        if not stem.endswith("mlp.experts"):
            out[name] = value.float() if name.endswith("A_log") else value.bfloat16()
            continue
        for expert, weight in enumerate(value.bfloat16()):
            parts = {"gate_proj": weight.chunk(2)[0], "up_proj": weight.chunk(2)[1]}
            for part, matrix in (parts if kind == "gate_up_proj" else {kind: weight}).items():
                out[f"{stem}.{expert}.{part}.weight"] = matrix
    return {name: value.detach().clone().contiguous() for name, value in out.items()}


def write_checkpoint(
    folder: Path, settings: dict[str, Any], target: Qwen3NextForCausalLM, mtp: MultiTokenPredictor
) -> None:
    """Write the weights, `config.json` and `generation_config.json`."""
    state = {**target.state_dict(), **{f"mtp.{name}": value for name, value in mtp.state_dict().items()}}
    save_file(to_published(state), folder / "model.safetensors", metadata={"format": "pt"})
    stops = [settings["eos_token_id"], settings["pad_token_id"]]
    generation = {"bos_token_id": stops[1], "pad_token_id": stops[1], "eos_token_id": stops, "do_sample": False}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def load_mtp(folder: Path, config: Qwen3NextConfig) -> MultiTokenPredictor:
    """Build the MTP head from the checkpoint's `mtp.*` tensors."""
    file = load_file(folder / "model.safetensors")
    state = {name.removeprefix("mtp."): value for name, value in file.items() if name.startswith("mtp.")}
    stem = "layers.0.mlp.experts"

    def stacked(part: str) -> Tensor:
        return torch.stack([state.pop(f"{stem}.{expert}.{part}.weight") for expert in range(config.num_experts)])

    state[f"{stem}.gate_up_proj"] = torch.cat([stacked("gate_proj"), stacked("up_proj")], dim=1)
    state[f"{stem}.down_proj"] = stacked("down_proj")
    mtp = MultiTokenPredictor(config)
    mtp.load_state_dict(state)
    return mtp


class Rows:
    """Random rows of a token stream that begin at one of the given starts."""

    def __init__(self, documents: list[list[int]], only_starts: bool) -> None:
        self.tokens = torch.tensor([token for document in documents for token in document])
        lengths = torch.tensor([0] + [len(document) for document in documents[:-1]])
        self.starts = lengths.cumsum(0) if only_starts else torch.arange(len(self.tokens))

    def sample(self, rows: int, size: int, generator: torch.Generator) -> Tensor:
        """[rows, size] token ids; the stream wraps around at its end."""
        picked = self.starts[torch.randint(len(self.starts), (rows,), generator=generator)]
        return self.tokens[(picked[:, None] + torch.arange(size)) % len(self.tokens)]


def train(args: argparse.Namespace, folder: Path) -> None:
    """Train on the topics and on chats about them, and write the checkpoint into `folder`."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    corpus, _ = split_corpus()
    chats = conversations(sections(corpus), args.chats, random.Random(args.seed))
    settings = json.loads((HERE / "architecture.json").read_text())
    tokenizer = make_tokenizer([*corpus.values()], settings, folder)
    end = tokenizer.pad_token_id
    settings |= {"bos_token_id": end, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": end}
    text = Rows([[*tokenizer(topic).input_ids, end] for topic in corpus.values()], only_starts=False)
    rendered = [tokenizer.apply_chat_template(**chat, tokenize=False) for chat in chats]
    chat = Rows([tokenizer(sample).input_ids for sample in rendered], only_starts=True)
    print(f"{len(text.tokens)} tokens of text, {len(chat.tokens)} of chats")

    config = Qwen3NextConfig(**settings)
    config._experts_implementation = args.experts_implementation
    target = Qwen3NextForCausalLM(config)
    mtp = MultiTokenPredictor(target.config)
    mtp.apply(target._init_weights)
    parameters = [*target.parameters(), *mtp.parameters()]
    print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters")
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    warm_up = max(1, args.steps // 20)

    def rate(step: int) -> float:
        """Warm up, then a half cosine down to a fiftieth."""
        done = max(0, step - warm_up) / max(1, args.steps - warm_up)
        return min((step + 1) / warm_up, 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    progress = trange(args.steps, desc="training", mininterval=2.0)
    for step in progress:
        # Every fourth step has fewer, longer rows, so that positions beyond the usual length are trained as well.
        stretch = 4 if step % 4 == 3 else 1
        rows, size = args.rows // stretch, args.length * stretch
        chatting = max(1, rows // 4)
        batch = torch.cat(
            [text.sample(rows - chatting, size + 2, generator), chat.sample(chatting, size + 2, generator)]
        )
        inputs, following, after = batch[:, :size], batch[:, 1 : size + 1], batch[:, 2:]
        output = target.model(inputs, use_cache=False, output_router_logits=True)
        hidden = output.last_hidden_state
        loss = F.cross_entropy(target.lm_head(hidden).flatten(0, 1), following.flatten())
        balance = load_balancing_loss_func(output.router_logits, config.num_experts, config.num_experts_per_tok)
        # The unrolled draft steps cost more than the target, so each step trains them on half of its rows.
        half = torch.randperm(rows, generator=generator)[: rows // 2]
        drafts = mtp.drafts(target, hidden[half], following[half], args.mtp_depth, teacher=True)
        draft_losses = [
            F.cross_entropy(logits[:, depth:].flatten(0, 1), after[half, depth:].flatten())
            for depth, logits in enumerate(drafts)
        ]
        total = loss + args.mtp_weight * sum(draft_losses) / len(draft_losses) + args.balance_weight * balance
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss:.3f}", mtp="/".join(f"{value:.2f}" for value in draft_losses))
    write_checkpoint(folder, settings, target, mtp)


@torch.inference_mode()
def evaluate(folder: Path, dtype: torch.dtype, prompt_tokens: int, new_tokens: int, show: int) -> None:
    """Print held-out loss, greedy continuations and the mean accepted length of the checkpoint in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = Qwen3NextForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    mtp = load_mtp(folder, target.config).to(dtype).eval()
    _, held_out = split_corpus()
    texts = [tokenizer(text, return_tensors="pt").input_ids for text in held_out.values()]
    windows = [window for ids in texts for window in ids.split(256, dim=1) if window.shape[1] > 1]
    losses = [target(ids, labels=ids).loss.float() * (ids.shape[1] - 1) for ids in windows]
    count = sum(ids.shape[1] - 1 for ids in windows)
    print(f"[{dtype}] held-out loss {sum(losses) / count:.3f} over {count} tokens")

    starts = [ids[:, at : at + prompt_tokens] for ids in texts for at in range(0, ids.shape[1] - prompt_tokens, 160)]
    prompts = torch.cat(starts)
    mask = torch.ones_like(prompts)
    generated = target.generate(prompts, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    stops = set(target.generation_config.eos_token_id)
    accepted: dict[int, list[int]] = {1: [], 2: [], 3: []}
    for index, padded in enumerate(generated.tolist()):
        ends = [at for at in range(prompt_tokens, len(padded)) if padded[at] in stops]
        row = padded[: ends[0] + 1] if ends else padded
        if index % 5 == 0 and index < 5 * show:
            prompt, answer = tokenizer.decode(row[:prompt_tokens]), tokenizer.decode(row[prompt_tokens:])
            print(f"--- continuation {index + 1}\n{prompt}>>>{answer}")
        for drafts, lengths in accepted.items():
            lengths.extend(accepted_drafts(target, mtp, row, prompt_tokens, drafts))
    for drafts, lengths in accepted.items():
        print(
            f"[{dtype}] {drafts} draft tokens: mean accepted length {1 + sum(lengths) / len(lengths):.3f}"
            f" ({len(lengths)} verify steps, {len(prompts)} passages)"
        )
    for subject in ("`with`", "`lambda`", "`yield`")[:show]:
        chat = [{"role": "user", "content": QUESTIONS[0].format(subject)}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = target.generate(**ids, max_new_tokens=200, do_sample=False)[0]
        print(f"--- chat\n{tokenizer.decode(answer)}")


def accepted_drafts(
    target: Qwen3NextForCausalLM, mtp: MultiTokenPredictor, row: list[int], prompt_tokens: int, drafts: int
) -> list[int]:
    """Accepted drafts of each verify step when the greedy output `row` is decoded with `drafts` draft tokens."""
    ids = torch.tensor([row])
    hidden = target.model(ids[:, :-1], use_cache=False).last_hidden_state
    logits = mtp.drafts(target, hidden, ids[:, 1:], drafts, teacher=False)
    drafted = [step[0].argmax(-1).tolist() for step in logits]
    lengths, position = list[int](), prompt_tokens - 1
    while position + 1 + drafts < len(row):
        matches = 0
        while matches < drafts and drafted[matches][position + matches] == row[position + 2 + matches]:
            matches += 1
        lengths.append(matches)
        # The verify step also yields the target's own token after the accepted ones.
        position += matches + 1
    return lengths


def main() -> None:
    """Parse the command line, train unless told otherwise, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--evaluate-only", action="store_true", help="evaluate the checkpoint in --output")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--rows", type=int, default=8, help="rows per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per row; every fourth step has longer rows")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--mtp-depth", type=int, default=3, help="draft steps that are unrolled in training")
    parser.add_argument("--mtp-weight", type=float, default=0.8)
    parser.add_argument("--balance-weight", type=float, default=0.01, help="weight of the router's balance loss")
    parser.add_argument("--chats", type=int, default=3000, help="number of chats to make from the topics")
    parser.add_argument("--experts-implementation", default="grouped_mm", choices=["eager", "grouped_mm", "batched_mm"])
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; by default PyTorch's choice")
    args = parser.parse_args()
    # Missing GPU kernels and long documents are expected here; the warnings about them would bury the figures.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.evaluate_only:
        # The folder is swapped in whole, so a reader never meets half a checkpoint.
        partial = args.output.with_name(args.output.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        began = time.monotonic()
        train(args, partial)
        print(f"trained in {(time.monotonic() - began) / 60:.1f} minutes")
        shutil.rmtree(args.output, ignore_errors=True)
        partial.rename(args.output)
    evaluate(args.output, torch.float32, prompt_tokens=48, new_tokens=128, show=4)
    evaluate(args.output, torch.bfloat16, prompt_tokens=48, new_tokens=128, show=0)


if __name__ == "__main__":
    main()
