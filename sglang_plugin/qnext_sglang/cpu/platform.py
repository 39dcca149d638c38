"""SGLang's platform for a CPU without AMX: PyTorch operators only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

ATTENTION_BACKEND = "qnext"


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    is_qnext = True
    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()  # neither Triton nor graphs

    def apply_server_args_defaults(self, server_args: Any) -> None:
        from qnext_sglang.cpu.defaults import apply_defaults

        apply_defaults(server_args)

    def get_device(self, device_id: int | None = 0) -> str:
        # Without --device SGLang takes a name from here, and splits it.
        return "cpu"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_quantization_config(self, quantization: str) -> type | None:
        from qnext_plugins.model import STORED_IN_INT4
        from qnext_sglang.quantization import CpuFp8Config, CpuInt4Config

        if quantization == "fp8":
            return CpuFp8Config
        return CpuInt4Config if quantization in STORED_IN_INT4 else None

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def support_mamba_cache_extra_buffer(self) -> bool:
        return True

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        if kind != "mha":
            return None
        from qnext_sglang.cpu.attention import CpuKVPool

        return CpuKVPool

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in ("EAGLE", "NEXTN")

    def get_default_speculative_draft_attention_backend(self, algorithm: str) -> str:
        return ATTENTION_BACKEND

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        return backend == ATTENTION_BACKEND

    def get_speculative_cache_locs_fn(self) -> Callable[..., Any]:
        from qnext_sglang.cpu.speculation import assign_extend_cache_locs

        return assign_extend_cache_locs
