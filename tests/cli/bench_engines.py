"""An engine that runs nothing: its times are known, so that what is made of them can be checked."""

from __future__ import annotations

from typing import Any

LAYER, REST, OFFSET = 0.010, 0.003, 1e-6
"""Seconds of a layer, of a step without layers, and of a layer for every token before a chunk."""


class Clockwork:
    """Answers as a stepped engine does; the model of one hidden size ends at its first decode."""

    def __init__(self, config: dict[str, Any], **_: Any) -> None:
        self.layers = config["num_hidden_layers"]

    def architecture(self) -> str:
        return "clockwork"

    def prefill(self, offset: int, with_layers: bool) -> float:
        return REST + (self.layers * (LAYER + OFFSET * offset) if with_layers else 0.0)

    def begin_decode(self, batch: int, context: int) -> None:
        if context > 4096:
            raise MemoryError("no room for so many tokens")

    def decode(self, steps: int, with_layers: bool) -> list[float]:
        return [REST + (self.layers * LAYER if with_layers else 0.0)] * steps

    def end_decode(self) -> None:
        pass
