"""What vLLM's configuration of a Qwen3-Next lacks on a CPU, filled in where the user left the default."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qnext_plugins.cores import binding_for
from qnext_plugins.settings import is_set
from qnext_vllm import logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

THREADS_BIND = "VLLM_CPU_OMP_THREADS_BIND"
INT4_METHODS = ("compressed-tensors", "auto_gptq", "inc")
"""vLLM's names for what may be int4 that our kernels read; the last is AutoRound's."""


def register_config_hook() -> None:
    """Have vLLM call what is below when it checks the configuration of a Qwen3-Next on a CPU."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return

    class Qwen3NextForCausalLMConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            bind_threads(vllm_config)
            serve_quantized(vllm_config)

    MODELS_CONFIG_MAP.setdefault("Qwen3NextForCausalLM", Qwen3NextForCausalLMConfig)


def bind_threads(vllm_config: VllmConfig) -> None:
    """Give each rank its share of the cores where there are more ranks than NUMA nodes."""
    from vllm.utils.cpu_resource_utils import get_visible_memory_node

    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    if is_set(THREADS_BIND) or is_set("VLLM_CPU_SIM_MULTI_NUMA") or parallel.data_parallel_size > 1:
        return
    binding = binding_for(ranks, len(get_visible_memory_node()))
    if binding is None:
        return
    os.environ[THREADS_BIND] = binding
    logger.info("qnext-plugins binds %d ranks to cores: %s=%s", ranks, THREADS_BIND, binding)


def serve_quantized(vllm_config: VllmConfig) -> None:
    """Have our kernels serve a checkpoint in block-wise FP8 or in int4, for which vLLM's on a CPU need AMX."""
    model = vllm_config.model_config
    online = model.quantization_config is not None
    if model.quantization is None or online or vllm_config.quant_config is not None:
        return
    import torch

    from qnext_plugins.model import TRANSPOSED, integer_obstacle, stored_names
    from qnext_vllm.linear import cpu_fp8_config, cpu_int4_config

    described, ours, reason = getattr(model.hf_config, "quantization_config", None), None, None
    if model.quantization == "fp8":
        ours = cpu_fp8_config(described)
    elif model.quantization in INT4_METHODS:
        reason = integer_obstacle(described)
        told_by_files = reason is None and (described or {}).get("quant_method") in TRANSPOSED
        ours = cpu_int4_config(described, stored_names(model.model, model.revision) if told_by_files else ())
    if ours is not None and model.dtype not in (torch.bfloat16, torch.float32):
        ours, reason = None, f"--dtype is {model.dtype}, not bfloat16 or float32"
    vllm_config.quant_config = ours
    if reason is not None:
        logger.warning("qnext-plugins leaves the checkpoint's weights to vLLM's own kernels: %s", reason)
