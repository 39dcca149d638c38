"""Reproducible random numbers: a stream of its own for each name, so that no tensor depends on another."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, name: str) -> torch.Generator:
    """A generator for what is called ``name`` in the checkpoint of ``seed``."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
