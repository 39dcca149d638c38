"""Prompts for the tiny checkpoint, from the text that it was trained on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

from transformers import AutoTokenizer

LENGTHS = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 33, 40, 48, 57, 63, 64, 65, 70, 85, 99, 110, 127, 128, 129, 130)
LONG_LENGTHS = (150, 191, 192, 193, 220, 255, 256, 257, 280, 300)


@cache
def prompts(checkpoint: Path) -> tuple[tuple[int, ...], ...]:
    """Passages of Python's documentation, 1 to 300 tokens long, each from another topic."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    lengths = LENGTHS + LONG_LENGTHS
    long_topics = sorted(name for name, text in topics.items() if len(text) > 2400)
    chosen = [long_topics[n % len(long_topics)] for n in range(len(lengths))]
    passages = [topics[name][200 + 50 * n :][:2000] for n, name in enumerate(chosen)]
    return tuple(tuple(tokenizer.encode(text)[:length]) for text, length in zip(passages, lengths, strict=True))
