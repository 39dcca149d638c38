"""What happens in a process before it serves our model: is it served at all, hooks, and the line that says so."""

from __future__ import annotations

import importlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sglang.srt.arg_groups.model_override_base import resolved_view
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import get_parallel, get_server_args
from transformers import PretrainedConfig

import qnext_plugins
from qnext_kernels import selected_backends
from qnext_kernels.dispatch import is_deterministic
from qnext_plugins.gpus import ENGINES_OWN
from qnext_plugins.model import ConfigError
from qnext_sglang import UnsupportedEngineError, decline, hooks, logger

IN_TREE = {
    "Qwen3NextForCausalLM": "sglang.srt.models.qwen3_next",
    "Qwen3NextForCausalLMMTP": "sglang.srt.models.qwen3_next_mtp",
}


def device() -> torch.device:
    """Of the model."""
    return torch.device(current_platform.device_type)


def unserved_flags(server_args: Any) -> str | None:
    """Why this configuration is not served by our model, or None."""
    # As far as SGLang has resolved it: the fields themselves stay what the user gave.
    server_args = resolved_view(server_args)
    reasons = {
        "--enable-dp-attention": server_args.enable_dp_attention,
        "--attn-dp-size above 1": server_args.attn_dp_size > 1,
        "--attn-cp-size above 1": server_args.attn_cp_size > 1,
        "--dcp-size above 1": server_args.dcp_size > 1,
        "--moe-dp-size above 1": server_args.moe_dp_size > 1,
        "--pp-size above 1": server_args.pp_size > 1,
        f"--moe-a2a-backend {server_args.moe_a2a_backend}": server_args.moe_a2a_backend not in (None, "none"),
        "--enable-eplb": server_args.enable_eplb,
        "--ep-num-redundant-experts": server_args.ep_num_redundant_experts > 0,
        "--init-expert-location": server_args.init_expert_location != "trivial",
        "--expert-distribution-recorder-mode": server_args.expert_distribution_recorder_mode is not None,
        "--enable-return-routed-experts": server_args.enable_return_routed_experts,
        "--enable-return-aux-hidden-states": server_args.enable_return_aux_hidden_states,
        "--cpu-offload-gb": server_args.cpu_offload_gb > 0,
        "--offload-group-size": server_args.offload_group_size > 0,
        "--rl-on-policy-target": server_args.rl_on_policy_target is not None,
        f"--kv-cache-dtype {server_args.kv_cache_dtype}": "fp4" in server_args.kv_cache_dtype,
        "--enable-mis": server_args.enable_mis,
        "--flashinfer-allreduce-fusion-backend cutedsl": server_args.flashinfer_allreduce_fusion_backend == "cutedsl",
        "--enable-two-batch-overlap": server_args.enable_two_batch_overlap,
        "--enable-lora": bool(server_args.enable_lora or server_args.lora_paths),
        "--enable-linear-replayssm": server_args.enable_linear_replayssm,
        "--enable-linear-replayssm-spec": server_args.enable_linear_replayssm_spec,
        f"--speculative-algorithm {server_args.speculative_algorithm}": server_args.speculative_algorithm
        not in (None, "NEXTN", "EAGLE"),
        f"--speculative-eagle-topk {server_args.speculative_eagle_topk} (a tree of drafts; 1 is a chain)": (
            server_args.speculative_eagle_topk or 1
        )
        > 1,
    }
    flags = [flag for flag, given in reasons.items() if given]
    return f"it does not serve {', '.join(flags)}" if flags else None


def stored_config(server_args: Any) -> dict[str, Any]:
    """The checkpoint's config.json with the user's overrides, as they are written."""
    server_args = resolved_view(server_args)
    stored, _ = PretrainedConfig.get_config_dict(server_args.model_path, revision=server_args.revision)
    return stored | json.loads(server_args.json_model_override_args)


def check_interval(full_attention_interval: int | None) -> None:
    """Raise ConfigError if it is missing: SGLang sizes its caches by it, and drops layer_types."""
    if full_attention_interval is None:
        raise ConfigError(
            "config.json: full_attention_interval is missing, which SGLang needs whether layer_types is there or not; "
            'add "full_attention_interval": 4 if every fourth layer is full attention'
        )


@cache
def in_tree_class(architecture: str) -> type | None:
    """SGLang's own class where ours does not serve (which a line then says), or None.

    Raises:
        UnsupportedEngineError: with ``QNEXT_STRICT=1``, or where SGLang's own model cannot run.
    """
    reason = unserved_flags(get_server_args())
    if reason is None:
        try:
            _install_hooks()
            return None
        except LookupError as error:
            reason = str(error)
    if on_plain_cpu():
        raise UnsupportedEngineError(f"qnext-plugins: {reason}, and SGLang's own {architecture} does not run on a CPU")
    decline(reason)
    return getattr(importlib.import_module(IN_TREE[architecture]), architecture)


def announce(architecture: str, dtype: torch.dtype) -> None:
    """Say which kernels serve ``architecture``, and keep its convolution's state as exact as its activations.

    Raises:
        BackendError: a backend that ``QNEXT_BACKEND`` forces cannot serve, or an operation has no backend for the
            deterministic mode.
    """
    if dtype == torch.float32:
        # SGLang keeps it in bfloat16 whatever the dtype of the model.
        os.environ.setdefault("SGLANG_MAMBA_CONV_DTYPE", "float32")
    backends = selected_backends(device(), dtype, but=() if device().type == "cpu" else ENGINES_OWN)
    kernels = ", ".join(f"{name}={backend}" for name, backend in backends.items())
    mode = ", deterministic" if is_deterministic() else ""
    logger.info("qnext-plugins %s serves %s in %s%s: %s", qnext_plugins.__version__, architecture, dtype, mode, kernels)


def checkpoint_folder() -> Path | None:
    """The folder whose safetensors files are about to be loaded, or None if it is something else."""
    server_args = resolved_view(get_server_args())
    return Path(server_args.model_path) if server_args.load_format in ("auto", "safetensors") else None


def loads_nothing() -> bool:
    """Whether no checkpoint is loaded at the start: the weights come later, in parts."""
    return resolved_view(get_server_args()).load_format == "dummy"


def stacks_layers() -> bool:
    """Whether the layers of a decode step may run as one call: on a CPU, on one rank, and with no one listening in."""
    server_args = get_server_args()
    return on_plain_cpu() and get_parallel().tp_size == 1 and not server_args.enable_hierarchical_cache


def _install_hooks() -> None:
    hooks.install(hooks.HOOKS)
    if on_plain_cpu():
        from qnext_sglang.cpu import hooks as cpu_hooks

        hooks.install(cpu_hooks.HOOKS)
        cpu_hooks.install_names()


def on_plain_cpu() -> bool:
    """Whether SGLang runs on our platform for CPUs, where its own kernels do not."""
    return getattr(current_platform, "is_qnext", False)
