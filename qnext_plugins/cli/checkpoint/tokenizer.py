"""Tokenizers of checkpoints: a copied one, or one that is made for a vocabulary of any size."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnext_plugins.cli.checkpoint.spec import SpecError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
END, START, STOP = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPACE = "Ġ"
"""A space in the alphabet of byte-level tokenizers."""
LONGEST = 4
"""Characters of the longest tokens."""
BYTES = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Vocabulary:
    """What a checkpoint must know of its tokenizer."""

    stop: int
    """The token that ends an answer."""
    padding: int
    outside: tuple[int, ...]
    """Tokens that a structured model never says: special ones, and those without a text of their own."""


def without_tokenizer(size: int) -> Vocabulary:
    """The vocabulary of a checkpoint without tokenizer: its last token ends an answer."""
    return Vocabulary(stop=size - 1, padding=size - 1, outside=(size - 1,))


def _words() -> Iterator[tuple[str, str]]:
    """Pairs that become tokens, shortest first: each a token that is there already, and a letter."""
    stems = [SPACE, *LETTERS]
    for _ in range(LONGEST - 1):
        yield from itertools.product(stems, LETTERS)
        stems = [stem + letter for stem, letter in itertools.product(stems, LETTERS)]


def generate(folder: Path, size: int, longest_text: int) -> Vocabulary:
    """Write a byte-level BPE tokenizer of ``size`` tokens to ``folder``: bytes, short words, special tokens last.

    Raises:
        SpecError: ``size`` is too small or too large for one.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = size - BYTES - len(SPECIAL_TOKENS)
    merges = list(itertools.islice(_words(), max(words, 0)))
    if words < 0 or len(merges) < words:
        least = BYTES + len(SPECIAL_TOKENS)
        most = least + sum(1 for _ in _words())
        raise SpecError(
            f"--vocab-size: expected {least} to {most} for a generated tokenizer, got {size}"
            " (--no-tokenizer makes none)"
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(stem + letter for stem, letter in merges), *SPECIAL_TOKENS]
    ids = {token: n for n, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    description = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": STOP,
        "pad_token": END,
        "additional_special_tokens": [START, STOP],
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest_text,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(description, indent=2) + "\n")
    # A byte that is no character by itself has no text of its own.
    unsaid = [n for n, token in enumerate(tokens) if token in SPECIAL_TOKENS or (n < BYTES and not token.isascii())]
    return Vocabulary(stop=ids[STOP], padding=ids[END], outside=tuple(unsaid))


class StoredTokenizer:
    """A tokenizer in a folder.

    Raises:
        SpecError: the folder has no tokenizer that can be read, or none that says how a text ends.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.folder = folder
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise SpecError(f"--tokenizer: expected a folder with a tokenizer.json, got {folder}")
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
            settings = json.loads((folder / "tokenizer_config.json").read_text())
        # tokenizers raises bare exceptions.
        except Exception as error:
            raise SpecError(f"--tokenizer: {folder} cannot be read: {' '.join(str(error).split())}") from None
        self.stop = self._id(settings, "eos_token")
        if self.stop is None:
            raise SpecError(f"--tokenizer: {folder}/tokenizer_config.json names no eos_token")
        self.padding = self._id(settings, "pad_token")

    def _id(self, settings: dict[str, Any], name: str) -> int | None:
        token = settings.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        return None if content is None else self.tokenizer.token_to_id(content)

    @property
    def size(self) -> int:
        """One more than the largest token."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def copy(self, folder: Path, vocabulary: int) -> Vocabulary:
        """Copy its files to ``folder`` for a model of so many tokens; raises SpecError if they are fewer than its."""
        if vocabulary < self.size:
            raise SpecError(f"--vocab-size: expected at least the tokenizer's {self.size}, got {vocabulary}")
        for name in FILES:
            if (self.folder / name).is_file():
                shutil.copy(self.folder / name, folder)
        spoken = set(self.tokenizer.get_vocab(with_added_tokens=False).values())
        special = set(self.tokenizer.get_added_tokens_decoder())
        outside = sorted(set(range(vocabulary)) - (spoken - special))
        assert self.stop is not None
        return Vocabulary(self.stop, self.stop if self.padding is None else self.padding, tuple(outside))
