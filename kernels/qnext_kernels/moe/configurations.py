"""Block sizes, warps and stages of the experts' products on a GPU: measured ones from a file, else a rule.

A file ``tuned/<name of the GPU>.json`` beside this module, as ``benchmarks/tune_experts.py`` writes it, holds what was
measured, for each shape by number of tokens::

    {"triton": "3.8.0", "shapes": [
        {"experts": 512, "hidden": 2048, "middle": 512, "top_k": 10, "weights": "bfloat16", "tokens": {
            "64": {"rows": 16,
                   "up": {"columns": 32, "depth": 128, "warps": 4, "stages": 4},
                   "down": {"columns": 64, "depth": 128, "warps": 4, "stages": 4}}}}]}

A call takes the entry of the fewest tokens that are not fewer than its own, else that of the most. The deterministic
mode always takes the rule, and of it the blocks of many tokens whatever the number is.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from qnext_kernels.fp8 import FP8_GROUP
from qnext_kernels.triton_support import Target, power_of_two

TUNED = Path(__file__).parent / "tuned"


class Product(NamedTuple):
    """How one of the two matrix products runs."""

    columns: int
    """Of the result a program; of the first product those behind SwiGLU, each of which is two rows of weights."""
    depth: int
    """Elements of the sum that are loaded at once."""
    warps: int
    stages: int
    """Loads that are under way, this one among them."""
    swapped: bool = False
    """Whether weights are the left factor of the instruction, which on Hopper has 64 rows: for blocks of fewer."""


class Configuration(NamedTuple):
    """Of a call: rows of a block, (token, choice) pairs of one expert, and both products."""

    rows: int
    up: Product
    down: Product


class Few(NamedTuple):
    """Of a call with few tokens, without blocks: columns of a program of both products, and its warps."""

    up_columns: int
    up_warps: int
    down_columns: int
    down_warps: int


class Shape(NamedTuple):
    """What a configuration is chosen for, beside the number of tokens and the GPU."""

    experts: int
    hidden: int
    middle: int
    top_k: int
    weights: str
    """Their dtype, without "torch."."""

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.weights).itemsize  # type: ignore[no-any-return]


def rule(shape: Shape, tokens: int | None, target: Target) -> Configuration:
    """A configuration from the shape, the number of tokens (None: for any number) and the GPU.

    Up to some ten thousand tokens reading the weights takes longer than multiplying, since 512 experts share ten times
    the tokens: blocks are as small as their rows are few, and columns as few as it takes to give every multiprocessor
    two programs. Beyond, blocks are as large as registers allow.
    """
    if tokens is None:
        return _sized(64, shape, 1 << 30, target)
    pairs = tokens * shape.top_k
    rows_of_an_expert = pairs / shape.experts
    rows = 128
    for size, most in ((16, 10), (32, 24), (64, 56)):
        if rows_of_an_expert <= most or tokens <= size:
            rows = size
            break
    return _sized(rows, shape, min(pairs, shape.experts), target)


def few(shape: Shape, tokens: int, target: Target) -> Few | None:
    """How a call runs that has few tokens, None where it has more: experts would be read more than once too often."""
    fp8 = shape.itemsize == 1
    if tokens > 1 and tokens * shape.top_k * (12 if fp8 else 6) > shape.experts:
        return None
    # Weights of a program; whole rows of them lie in registers, of the second product those of all choices. With FP8
    # there are more, for every program quantizes its activations, and where a program waits behind its loads: it has
    # them all under way then, as the compiler else may not.
    up, down, warps = (1 << 15, 1 << 16, 8) if fp8 else (1 << 13, 1 << (15 if target.overlaps else 14), 4)
    if fp8 and not target.e4m3:
        up, down = up // 4, down // 4  # decoding takes registers
    up //= 2 * power_of_two(shape.hidden)
    down //= power_of_two(shape.top_k) * power_of_two(shape.middle)
    return Few(min(up, 16), 4, min(down, 16), warps) if min(up, down) > 0 else None


def _sized(rows: int, shape: Shape, blocks: int, target: Target) -> Configuration:
    hopper = target.nvidia and target.shared_memory > 200 << 10
    itemsize = shape.itemsize
    if itemsize == 4:
        # Three products in tf32 for one in float32: their factors fill the registers.
        rows = min(rows, 64)
        widest, depth = 32, 32
    elif rows <= 32:
        widest, depth = 64, 128
    elif rows == 64:
        widest, depth = 128, 64
    else:
        widest, depth = (256 if hopper else 128), 64
    if itemsize == 1:
        # There is a second sum in registers, that of a group.
        rows, depth = min(rows, 64), FP8_GROUP
        widest = min(widest, 128 if hopper else 64)
    warps = 8 if rows == 128 else 4

    def product(sum_size: int, width: int, per_column: int) -> Product:
        most = max(16, power_of_two(width))
        columns = min(widest // per_column, most, FP8_GROUP if itemsize == 1 else widest)
        if itemsize == 1 and rows >= 64 and not target.e4m3:
            columns = min(columns, 32)  # weights that are decoded in registers fill them
        if hopper and rows <= 32 and itemsize < 4 and per_column == 1:
            columns = min(128, most)
        while rows <= 32 and columns > 16 and blocks * -(-width // columns) < 264:
            columns //= 2
        deep = min(depth, max(32, power_of_two(sum_size)))
        # Activations of FP8 lie in bfloat16 where a GPU has no products of e4m3.
        stage = (rows * (itemsize if hopper else max(itemsize, 2)) + columns * per_column * itemsize) * deep
        shared = target.shared_memory // (2 if hopper and rows <= 64 else 1)  # of two programs a multiprocessor
        stages = max(1, min(4, -(-sum_size // deep), (shared - 1024) // stage))
        swapped = hopper and rows <= 32 and itemsize < 4 and columns * per_column >= 64
        return Product(columns, deep, warps, stages if target.nvidia else min(stages, 2), swapped)

    return Configuration(rows, product(shape.hidden, shape.middle, 2), product(shape.middle, shape.hidden, 1))


@cache
def load(file: Path) -> dict[Shape, dict[int, Configuration]]:
    """The configurations of a file, none where there is no such file.

    Raises:
        ValueError: the file is not as described above; the message names it.
    """
    if not file.exists():
        return {}
    try:
        return {
            Shape(**{name: entry[name] for name in Shape._fields}): {
                int(tokens): Configuration(found["rows"], Product(**found["up"]), Product(**found["down"]))
                for tokens, found in entry["tokens"].items()
            }
            for entry in json.loads(file.read_text())["shapes"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected tuned configurations of the experts, got {error!r}") from error


def save(file: Path, triton: str, found: dict[Shape, dict[int, Configuration]]) -> None:
    """Write a file that :func:`load` reads."""
    shapes = [
        shape._asdict()
        | {
            "tokens": {
                str(tokens): {"rows": best.rows, "up": best.up._asdict(), "down": best.down._asdict()}
                for tokens, best in sorted(by_tokens.items())
            }
        }
        for shape, by_tokens in found.items()
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"triton": triton, "shapes": shapes}, indent=1) + "\n")


def file_of(gpu: str, directory: Path = TUNED) -> Path:
    """The file of a GPU of this name, as ``torch.cuda.get_device_name`` gives it."""
    return directory / f"{gpu.replace(' ', '_').replace('/', '_')}.json"


def choose(
    shape: Shape, tokens: int, target: Target, gpu: str | None, *, deterministic: bool, directory: Path = TUNED
) -> Configuration:
    """The configuration of a call: measured where there is one for the GPU of this name and the shape, else the rule.

    Args:
        deterministic: one configuration for any number of tokens, so that no bit depends on it.
    """
    if deterministic:
        return rule(shape, None, target)
    measured = load(file_of(gpu, directory)).get(shape) if gpu is not None else None
    if not measured:
        return rule(shape, tokens, target)
    return measured[min((count for count in measured if count >= tokens), default=max(measured))]
