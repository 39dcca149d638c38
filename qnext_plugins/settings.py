"""Every ``QNEXT_*`` environment variable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


class SettingsError(ValueError):
    """One line about a variable: its name, what was expected, what came."""


class Settings(BaseSettings):
    """Read from the environment when it is made; an empty variable counts as one that is not set.

    Raises:
        SettingsError: a switch that is neither on nor off.
    """

    model_config = SettingsConfigDict(env_prefix="QNEXT_", env_ignore_empty=True, extra="ignore")

    backend: str = Field(default="", description="Forces kernel backends: names or operation=name, with commas.")
    cache_dir: Path | None = Field(
        default=None, description="Where compiled CPU kernels are kept; by default the user's cache folder."
    )
    deterministic: bool = Field(
        default=False, description="Only batch-invariant kernels serve; an error where one operation has none."
    )
    disable: bool = Field(default=False, description="Leaves the engine's own Qwen3-Next in place.")
    gluon: bool = Field(default=True, description="On Hopper a prefill walks with the kernel in Gluon.")
    isa: str | None = Field(default=None, description="Instruction set of the CPU kernels: avx512bf16 or avx2.")
    overlap: bool = Field(
        default=True, description="GPU kernels begin before the launch in front has ended, where the GPU can do that."
    )
    strict: bool = Field(default=False, description="Raises where the plugin would otherwise step back with one line.")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = f"QNEXT_{first['loc'][0]}".upper()
            raise SettingsError(f"{name}: expected 1 or 0, got {first['input']!r}") from None

    def forced_backends(self) -> dict[str, str]:
        """``backend`` as {operation or "*": backend name}; raises BackendError on an unknown name."""
        from qnext_kernels.dispatch import parse_forced

        return parse_forced(self.backend)


def is_set(variable: str) -> bool:
    """Whether the user has set an environment variable to something."""
    return bool(os.environ.get(variable))
