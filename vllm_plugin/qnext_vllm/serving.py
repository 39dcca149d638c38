"""What happens once in a process that serves our model."""

from __future__ import annotations

import torch

import qnext_plugins
from qnext_kernels import selected_backends
from qnext_vllm import logger
from qnext_vllm import vllm_api as api
from qnext_vllm.host_kernels import register_host_kernels


def prepare_process(vllm_config: api.VllmConfig, architecture: str) -> None:
    """Install what this platform lacks and say which kernels serve ``architecture``.

    Raises:
        BackendError: a backend that ``QNEXT_BACKEND`` forces cannot serve.
    """
    register_host_kernels()
    device, dtype = torch.device(vllm_config.device_config.device), vllm_config.model_config.dtype
    kernels = ", ".join(f"{name}={backend}" for name, backend in selected_backends(device, dtype).items())
    logger.info("qnext-plugins %s serves %s in %s: %s", qnext_plugins.__version__, architecture, dtype, kernels)
