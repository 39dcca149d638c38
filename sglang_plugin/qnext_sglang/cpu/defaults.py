"""Settings that the user left open, where SGLang would choose for a GPU or stop."""

from __future__ import annotations

import os
from typing import Any

from qnext_plugins.cores import binding_for
from qnext_plugins.settings import Settings, is_set
from qnext_sglang import UnsupportedEngineError, logger
from qnext_sglang.cpu.platform import ATTENTION_BACKEND

MAX_RUNNING_REQUESTS = 16
STATE_SLOTS_PER_REQUEST = 10
"""A running request holds up to 5 slots of recurrent state; as many again keep prefixes."""
MAX_TOTAL_TOKENS = 262_272
"""The native context of Qwen3-Next-80B-A3B, and two pages that SGLang keeps free. It takes less where memory does."""

PAGE_SIZE = 64
"""Attention reads whole pages much faster than tokens that lie one by one; prefixes are cached by as many anyway."""

THREADS_BIND = "SGLANG_CPU_OMP_THREADS_BIND"


def apply_defaults(server_args: Any) -> None:
    """Write the chosen fields to ``server_args`` and say what was chosen.

    Raises:
        ConfigError: SGLang cannot read the checkpoint's configuration.
        UnsupportedEngineError: a flag is not served, and SGLang's own model does not run on a CPU.
    """
    from qnext_sglang.serving import check_interval, stored_config, unserved_flags

    config = stored_config(server_args)
    if "Qwen3NextForCausalLM" not in config.get("architectures", ()):
        return
    check_interval(config.get("full_attention_interval"))
    if (reason := unserved_flags(server_args)) is not None:
        raise UnsupportedEngineError(f"qnext-plugins on a CPU: {reason}")
    if server_args.speculative_use_rejection_sampling:
        raise UnsupportedEngineError("qnext-plugins on a CPU: it does not serve --speculative-use-rejection-sampling")
    chosen: dict[str, Any] = {}
    # SGLang has put this name in already; its kernels need AMX.
    if server_args.attention_backend in (None, "intel_amx"):
        chosen["attention_backend"] = ATTENTION_BACKEND
    if server_args.max_running_requests is None:
        chosen["max_running_requests"] = MAX_RUNNING_REQUESTS
    if server_args.max_mamba_cache_size is None:
        requests = server_args.max_running_requests or MAX_RUNNING_REQUESTS
        chosen["max_mamba_cache_size"] = STATE_SLOTS_PER_REQUEST * requests
    if server_args.max_total_tokens is None:
        chosen["max_total_tokens"] = MAX_TOTAL_TOKENS
    if server_args.mamba_radix_cache_strategy == "no_buffer" and not server_args.disable_overlap_schedule:
        chosen["disable_overlap_schedule"] = True
    if _takes_pages(server_args):
        chosen["page_size"] = PAGE_SIZE
    # An idle scheduler would keep a core busy that the model, or another program, computes with.
    if not server_args.sleep_on_idle:
        chosen["sleep_on_idle"] = True
    if Settings().deterministic and not server_args.enable_deterministic_inference:
        chosen["enable_deterministic_inference"] = True
    for name, value in chosen.items():
        setattr(server_args, name, value)
    if (binding := _thread_binding(server_args)) is not None:
        os.environ[THREADS_BIND] = chosen[THREADS_BIND] = binding
    settings = " ".join(f"{name}={value}" for name, value in chosen.items())
    if settings:
        logger.info("qnext-plugins chose for this CPU: %s", settings)


def _takes_pages(server_args: Any) -> bool:
    """Whether the user has left the page size open, and nothing that SGLang or the user chooses needs another."""
    if server_args.page_size is not None or max(0, server_args.chunked_prefill_size or 0) % PAGE_SIZE:
        return False
    # What SGLang makes of "auto" without pages.
    overlaps = not server_args.disable_overlap_schedule and server_args.linear_attn_backend == "triton"
    strategy = server_args.mamba_radix_cache_strategy
    buffered = overlaps if strategy == "auto" else strategy != "no_buffer"
    return server_args.disable_radix_cache or (buffered and server_args.mamba_track_interval % PAGE_SIZE == 0)


def _thread_binding(server_args: Any) -> str | None:
    from sglang.srt.utils import get_cpu_ids_by_node

    if is_set(THREADS_BIND):
        return None
    return binding_for(server_args.tp_size * server_args.dp_size, len(get_cpu_ids_by_node()))
