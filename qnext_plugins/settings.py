"""Every ``QNEXT_*`` environment variable."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Read from the environment when it is made; an invalid value raises pydantic's ``ValidationError``."""

    model_config = SettingsConfigDict(env_prefix="QNEXT_", extra="ignore")

    backend: str = Field(default="", description="Forces kernel backends: names or operation=name, with commas.")
    cache_dir: Path | None = Field(
        default=None, description="Where compiled CPU kernels are kept; by default the user's cache folder."
    )
    deterministic: bool = Field(
        default=False, description="Only batch-invariant kernels serve; an error where one operation has none."
    )
    disable: bool = Field(default=False, description="Leaves the engine's own Qwen3-Next in place.")
    isa: str | None = Field(default=None, description="Instruction set of the CPU kernels: avx512bf16 or avx2.")
    strict: bool = Field(default=False, description="Raises where the plugin would otherwise step back with one line.")

    def forced_backends(self) -> dict[str, str]:
        """``backend`` as {operation or "*": backend name}; raises BackendError on an unknown name."""
        from qnext_kernels.dispatch import parse_forced

        return parse_forced(self.backend)


def is_set(variable: str) -> bool:
    """Whether the user has set an environment variable to something."""
    return bool(os.environ.get(variable))
