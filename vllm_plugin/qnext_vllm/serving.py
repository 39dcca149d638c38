"""What happens once in a process that serves our model."""

from __future__ import annotations

import torch

import qnext_plugins
from qnext_kernels import selected_backends
from qnext_kernels.dispatch import is_deterministic
from qnext_plugins.gpus import ENGINES_OWN
from qnext_plugins.settings import Settings
from qnext_vllm import determinism, logger
from qnext_vllm import vllm_api as api
from qnext_vllm.block_copies import copy_whole_blocks
from qnext_vllm.host_kernels import register_host_kernels
from qnext_vllm.seeded_prefill import withhold_generators


def prepare_process(vllm_config: api.VllmConfig, architecture: str) -> None:
    """Install what this platform lacks and say which kernels serve ``architecture``.

    Raises:
        BackendError: a backend that ``QNEXT_BACKEND`` forces cannot serve, or an operation has no backend for the
            deterministic mode.
        DeterminismError: the configuration is not served in the deterministic mode.
    """
    register_host_kernels()
    withhold_generators()
    copy_whole_blocks()
    device, dtype = torch.device(vllm_config.device_config.device), vllm_config.model_config.dtype
    on_gpu = device.type != "cpu"
    backends = selected_backends(device, dtype, but=ENGINES_OWN if on_gpu else ())
    kernels = ", ".join(f"{name}={backend}" for name, backend in backends.items())
    determinism.prepare(vllm_config)
    keep_graphs_apart(vllm_config)
    mode = ", deterministic" if is_deterministic() else ""
    logger.info("qnext-plugins %s serves %s in %s%s: %s", qnext_plugins.__version__, architecture, dtype, mode, kernels)


def keep_graphs_apart(vllm_config: api.VllmConfig) -> None:
    """Have vLLM's cache of compiled graphs tell apart what ours put into them; by itself it knows its own variables."""
    chosen = {"backend": Settings().backend, "deterministic": is_deterministic()}
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config["qnext"] = {"version": qnext_plugins.__version__, **chosen}
