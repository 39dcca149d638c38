#!/usr/bin/env python3
"""Layers of Qwen3-Next-80B-A3B at real widths in vLLM on this CPU, with the plugin and without, step by step.

    python benchmarks/cpu_slice.py [--quick] [--layers 4 --experts 256] [--threads 1,2] [--csv FILE] [--plot FILE]
    python benchmarks/cpu_slice.py --fp8 --peer bfloat16,vllm,vllm-alike [...]
    python benchmarks/cpu_slice.py --int4 32 [--int8] --peer bfloat16,fp8,int4,vllm [...]
    python benchmarks/cpu_slice.py [--fp8 | --int4 32] --peer llama.cpp --llama-python PYTHON [...]

Two engines with random bfloat16 weights are held in memory at once and run in turns: a prefill each, then some decode
steps each, and so on; medians count. A decode step is timed as a whole: scheduling, every layer, head, sampling. The
verify step is timed with n-gram drafts that are all accepted, so that a step is one of 1 + drafts tokens and no draft
model; not against llama.cpp. vllm-alike is vLLM's own in the numbers that ours are in, which it has kernels for where
the processor has AMX. Beside ours in FP8 llama.cpp's linears and experts are in Q8_0, beside int4 in Q4_0. Times are
wall times: they need a machine that does nothing else. roof_pct is the least time over ours: what memory bandwidth (a
read loop) or the better of two matrix products allows for the weights, caches and states that the step must move, or
for its FLOP.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cpu_report import Result, make_console, parse, positive_numbers, report
from cpu_slice_engine import Engine, Side
from cpu_slice_llama import LlamaEngine, LlamaSide, find_llama
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qnext_kernels.integers import INT_GROUPS
from qnext_plugins.cli.bench.models import Slice, SliceWork
from qnext_plugins.cli.bench.roofs import OtherLoad, Roofs, describe_machine
from qnext_plugins.cli.bench.stepped import EngineError

IN_TREE = "vLLM in-tree"
OURS = {"bfloat16": "plugin, bfloat16", "fp8": "plugin, block-wise FP8", "int4": "plugin, int4"}
"""Our own, in other numbers, as peers."""
PEERS = ("vllm", "vllm-alike", "llama.cpp", *OURS)
LLAMA_TYPES = {"bfloat16": "BF16", "fp8": "Q8_0", "int4": "Q4_0"}
"""What llama.cpp's linears and experts are in beside ours: as many bits a number, scales of 16 bits in groups of 32."""
STEPS = 8
"""Decode steps of one engine before it is the other's turn."""
DRAFTS = 2


@dataclass(frozen=True)
class Pair:
    """The engines that take turns, ours first; without a peer that did not start."""

    engines: list[Engine]
    peer: str

    def result(self, op: str, shape: str, threads: int, times: list[float], flops: float, moved: float) -> Result:
        ours, *peer = times
        return Result(op, shape, threads, ours, self.peer, peer[0] if peer else None, flops, moved)


@contextmanager
def start(sides: list[Side], args: argparse.Namespace, console: Console) -> Iterator[Pair | None]:
    """The engines of ``sides``, with a line for one that does not start; None if that is ours."""
    started: list[Engine | None] = []
    running: list[Engine] = []
    try:
        for side in sides:
            log = args.logs / f"{side.name.replace(' ', '-')}-{side.drafts}.log"
            kind = LlamaEngine if isinstance(side, LlamaSide) else Engine
            engine = kind.start(side, args.model, max(args.threads), log)
            running.append(engine)
            try:
                engine.wait()
                started.append(engine)
            except EngineError as error:
                console.print(str(error), style="red", markup=False)
                started.append(None)
        peer = sides[1].name if len(sides) > 1 else IN_TREE
        yield None if started[0] is None else Pair([engine for engine in started if engine is not None], peer)
    finally:
        for engine in running:
            engine.stop()


def medians(engines: list[Engine], rounds: int, run: Callable[[Engine], list[float]]) -> list[float]:
    """Median seconds of each engine; they run in turns, ``rounds`` times."""
    seen: list[list[float]] = [[] for _ in engines]
    for _ in range(rounds):
        for engine, times in zip(engines, seen, strict=True):
            times += run(engine)
    return [statistics.median(times) for times in seen]


def measure_prefill(pair: Pair, args: argparse.Namespace, tokens: int) -> Iterator[Result]:
    """A prompt that no prefix cache knows, to its first token."""
    rng = random.Random(tokens)

    def run(engine: Engine, threads: int) -> list[float]:
        seconds = engine.prefill(rng.choices(range(1, args.model.vocabulary), k=tokens), threads)
        engine.finish()
        return [seconds]

    work = SliceWork(args.model)
    for engine in pair.engines:
        run(engine, max(args.threads))
    for threads in args.threads:
        times = medians(pair.engines, args.rounds, lambda engine, threads=threads: run(engine, threads))
        yield pair.result("prefill", f"T={tokens}", threads, times, work.flops(tokens, tokens), work.weights(tokens))


def measure_decode(pair: Pair, args: argparse.Namespace, context: int, op: str) -> Iterator[Result]:
    """Steps behind a prompt of ``context`` tokens: of one token each, or all of 1 + drafts."""
    tokens = 1 + pair.engines[0].side.drafts
    prompt = [0] * context if tokens > 1 else random.Random(context).choices(range(1, args.model.vocabulary), k=context)

    def run(engine: Engine, threads: int) -> list[float]:
        return [seconds for seconds, given in engine.steps(STEPS, threads) if given == tokens]

    for engine in pair.engines:
        engine.prefill(prompt, max(args.threads))
        engine.steps(STEPS, max(args.threads))
    work = SliceWork(args.model)
    for threads in args.threads:
        times = medians(pair.engines, 2 * args.rounds, lambda engine, threads=threads: run(engine, threads))
        flops = work.flops(tokens, context) + 2 * (tokens - 1) * args.model.vocabulary * args.model.hidden
        yield pair.result(op, f"context={context}", threads, times, flops, work.decode(context, tokens))
    for engine in pair.engines:
        engine.finish()


def measure_verify(pair: Pair, args: argparse.Namespace, console: Console) -> Iterator[Result]:
    """Decode steps of which every one verifies drafts that are all accepted."""
    able = []
    for engine in pair.engines:
        try:
            engine.constant()
            engine.prefill([0] * 32, max(args.threads))
            engine.steps(STEPS, max(args.threads))
            engine.finish()
            able.append(engine)
        except EngineError as error:
            console.print(str(error), style="red", markup=False)
            engine.stop()  # for seconds it frees its memory, on a core that the others need
    if able and able[0].side.plugin:
        yield from measure_decode(Pair(able, pair.peer), args, args.context[0], f"verify, {1 + DRAFTS} tokens")


def run(args: argparse.Namespace, console: Console) -> tuple[list[Result], Roofs]:
    results, roofs = list[Result](), Roofs()
    ours = Side("with the plugin", plugin=True, eager=args.eager, fp8=args.fp8, int4=args.int4, int8=args.int8)
    pairs = [[ours]] if args.alone else [[ours, peer] for peer in args.peers]
    drafting = [
        [replace(side, drafts=DRAFTS) for side in pair] for pair in pairs if not isinstance(pair[-1], LlamaSide)
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # No refreshing thread: it would take time from what is measured.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        total = len(pairs) * (1 + len(args.prefill) + len(args.context)) + 2 * len(drafting)
        task = progress.add_task("", total=total)

        def step(description: str) -> None:
            progress.advance(task)
            progress.update(task, description=description, refresh=True)

        progress.update(task, description="roofs", refresh=True)
        roofs.measure(args.threads, args.quick)
        for sides in pairs:
            step("starting the engines")
            with start(sides, args, console) as pair:
                if pair is None:
                    return results, roofs
                for tokens in args.prefill:
                    step(f"prefill {tokens}")
                    results += measure_prefill(pair, args, tokens)
                for context in args.context:
                    step(f"decode at {context}")
                    results += measure_decode(pair, args, context, "decode")
        for sides in drafting:
            step("starting the engines, with drafts")
            with start(sides, args, console) as pair:
                step(f"verify, {1 + DRAFTS} tokens")
                if pair is not None:
                    results += measure_verify(pair, args, console)
        roofs.measure(args.threads, args.quick)
    return results, roofs


def in_words(results: list[Result]) -> Iterator[str]:
    """Tokens a second, and a verify step in decode steps."""
    for row in results:
        if row.op == "decode":
            theirs = "" if row.peer is None else f", {row.peer_name} {1 / row.peer:.1f}"
            yield f"decode, {row.shape}, threads={row.threads}: {1 / row.ours:.1f} tokens/s{theirs}"
        elif row.op == "prefill":
            tokens = int(row.shape.removeprefix("T="))
            theirs = "" if row.peer is None else f", {row.peer_name} {tokens / row.peer:.0f}"
            yield f"prefill, {row.shape}, threads={row.threads}: {tokens / row.ours:.0f} tokens/s{theirs}"
        else:
            same = ("decode", row.shape, row.threads, row.peer_name)
            step = next(r for r in results if (r.op, r.shape, r.threads, r.peer_name) == same)
            yield f"{row.op}, {row.shape}, threads={row.threads}: {row.ours / step.ours:.2f} of our decode steps"


def quantized(args: argparse.Namespace) -> str:
    """What the weights of ours are in, which are not in bfloat16."""
    if args.fp8:
        return "block-wise FP8"
    return f"int4, groups of {args.int4}" + (", all but experts in int8" if args.int8 else "")


def peer_names(value: str) -> list[str]:
    """Some of :data:`PEERS`, separated by commas."""
    names = list(dict.fromkeys(value.split(",")))
    if not set(names) <= set(PEERS):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PEERS)}, with commas, got {value}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="a multiple of 4 (default 4)")
    parser.add_argument("--experts", type=int, default=256, help="6 MB each, a layer and engine (default 256)")
    parser.add_argument("--vocabulary", type=int, default=Slice.vocabulary, help="default 151936")
    parser.add_argument("--prefill", type=positive_numbers, default="512,2048", help="tokens, default 512,2048")
    parser.add_argument("--context", type=positive_numbers, default="128,32768", help="tokens, default 128,32768")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each engine (default 3)")
    parser.add_argument("--eager", action="store_true", help="both without torch.compile")
    parser.add_argument("--fp8", action="store_true", help="ours in block-wise FP8; peers vllm and bfloat16 are not")
    help_int4 = "ours in int4, in groups of so many columns: 32, 64 or 128"
    parser.add_argument("--int4", type=int, choices=INT_GROUPS, metavar="GROUP", help=help_int4)
    parser.add_argument("--int8", action="store_true", help="beside --int4: all but routed experts in int8")
    help_peer = (
        "some of vllm (default), vllm-alike, in the numbers that ours are in, llama.cpp, and bfloat16, fp8 and int4, "
        "the plugin's own, with commas"
    )
    parser.add_argument("--peer", type=peer_names, default="vllm", help=help_peer)
    python = os.environ.get("QNEXT_LLAMA_PYTHON")
    parser.add_argument("--llama-python", default=python, metavar="PYTHON", help="by default $QNEXT_LLAMA_PYTHON")
    parser.add_argument("--alone", action="store_true", help="without the peer")
    parser.add_argument("--quick", action="store_true", help="shortest prefill and context, two turns: five minutes")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the engines' logs there")
    args = parse(parser)
    if args.layers < 4 or args.layers % 4:
        parser.error(f"--layers: expected a multiple of 4, got {args.layers}")
    if args.fp8 and args.int4:
        parser.error("--int4: expected without --fp8, got both")
    if args.int8 and not args.int4:
        parser.error("--int8: expected beside --int4, got it alone")
    if "vllm-alike" in args.peer and not (args.fp8 or args.int4):
        parser.error("--peer: expected vllm-alike beside --fp8 or --int4, got it without; in bfloat16 it is vllm")
    if args.quick:
        args.prefill, args.context, args.rounds = args.prefill[:1], args.context[:1], 2
    header, others = describe_machine(), OtherLoad()
    args.peers = []
    for name in [] if args.alone else args.peer:
        if name == "vllm-alike":
            alike = {"fp8": args.fp8, "int4": args.int4, "int8": args.int8}
            args.peers.append(Side(f"{IN_TREE}, {quantized(args)}", plugin=False, eager=args.eager, **alike))
            continue
        if name != "llama.cpp":
            numbers = {"fp8": name == "fp8", "int4": args.int4 or INT_GROUPS[0] if name == "int4" else None}
            args.peers.append(Side(OURS.get(name, IN_TREE), plugin=name in OURS, eager=args.eager, **numbers))
            continue
        try:
            llama, package = find_llama(
                args.llama_python, LLAMA_TYPES["int4" if args.int4 else "fp8" if args.fp8 else "bfloat16"]
            )
        except ValueError as error:
            parser.error(f"--llama-python: {error}")
        args.peers.append(llama)
        header.append(f"{llama.name} of {package}")
    args.model = Slice(args.layers, args.experts, args.vocabulary, fp8=args.fp8, int4=args.int4, int8=args.int8)
    args.logs = args.logs or Path(tempfile.mkdtemp(prefix="cpu-slice-"))
    args.logs.mkdir(parents=True, exist_ok=True)

    console = make_console()
    stored = "bfloat16"
    if args.fp8 or args.int4:
        stored += f", ours in {quantized(args)}"
    header.append(f"slice: {args.layers} layers, {args.experts} experts, vocabulary {args.vocabulary}, {stored}")
    results, roofs = run(args, console)
    header += [roofs.describe(threads) for threads in args.threads]
    header += [others.describe(), *in_words(results)]
    report(args, console, header, results, roofs)
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
