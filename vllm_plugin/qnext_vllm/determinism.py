"""The deterministic mode in vLLM: ``QNEXT_DETERMINISTIC=1`` on a CPU, ``VLLM_BATCH_INVARIANT=1`` anywhere.

Our kernels are batch invariant as they are. On a CPU, where all of them are ours, what is left to do is to refuse what
they do not serve, to keep vLLM's own mode, which is made of Triton kernels, away, and to give a row's top
log-probabilities one order. On a GPU linears, head, attention and sampling are vLLM's, and its own mode makes them
invariant: what is left is to refuse what neither of the two keeps.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from qnext_kernels.dispatch import is_deterministic, set_deterministic
from qnext_plugins.largest import largest_first


class DeterminismError(RuntimeError):
    """The deterministic mode is asked for and cannot be served; the message says what stands against it."""


def turn_on_where_asked() -> None:
    """Turn the mode on in this process if one of the two variables asks for it."""
    from vllm import envs
    from vllm.platforms import current_platform

    if envs.VLLM_BATCH_INVARIANT:
        set_deterministic(True)
        if current_platform.is_cpu():
            _keep_triton_operators_away()


def obstacles(vllm_config: Any) -> list[str]:
    """What of this configuration would run on operators that are not batch invariant."""
    from qnext_vllm.attention import attention_backend, stores_model_dtype
    from qnext_vllm.gated_delta_net import state_dtypes
    from qnext_vllm.linear import OURS_ON_CPU

    model, cache = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    device, dtype = torch.device(vllm_config.device_config.device), model.dtype
    _, state_dtype = state_dtypes(vllm_config)
    cpu = device.type == "cpu"
    found = {
        f"a head in {model.head_dtype} beside {dtype}": model.head_dtype not in (None, dtype),
        "LoRA adapters": vllm_config.lora_config is not None,
        f"--kv-cache-dtype {cache} beside {dtype}": (
            attention_backend(cache, dtype, device) is None if cpu else not stores_model_dtype(cache, dtype)
        ),
        f"--mamba-ssm-cache-dtype {state_dtype}": state_dtype != torch.float32,
    }
    quantized = vllm_config.quant_config is not None and not isinstance(vllm_config.quant_config, OURS_ON_CPU)
    weights = [f"{model.quantization} weights"] if cpu and quantized else []
    return weights + ([] if cpu else _on_a_gpu(vllm_config)) + [name for name, there in found.items() if there]


def _on_a_gpu(vllm_config: Any) -> list[str]:
    """What of the weights neither our experts nor vLLM's own mode multiply alike in any batch."""
    from qnext_vllm import experts

    if vllm_config.quant_config is not None:
        quantization = f"{vllm_config.model_config.quantization} weights"
        device, dtype = torch.device(vllm_config.device_config.device), vllm_config.model_config.dtype
        columns = experts.columns_of_a_rank(vllm_config)
        if experts.fp8_obstacle(vllm_config.quant_config, columns, device, dtype) is not None:
            return [quantization]
        # Its other kernels for block-wise FP8 choose their tiles by the number of tokens.
        if not _multiplies_fp8_on_triton(vllm_config.kernel_config):
            return [f"{quantization} without --linear-backend triton"]
    reason = None if vllm_config.lora_config is not None else experts.obstacle(vllm_config)
    return [] if reason is None else [f"vLLM's own experts ({reason})"]


def _multiplies_fp8_on_triton(kernel_config: Any) -> bool:
    from vllm.platforms import current_platform

    chosen = (kernel_config.linear_backend_per_quant or {}).get("fp8_block_w8a8", kernel_config.linear_backend)
    return chosen == "triton" or current_platform.is_rocm()


def prepare(vllm_config: Any) -> None:
    """Make this process ready for the mode, if it is on.

    Raises:
        DeterminismError: this configuration is not served in it.
    """
    if not is_deterministic():
        return
    if found := obstacles(vllm_config):
        raise DeterminismError(f"qnext-plugins: the deterministic mode does not serve {', '.join(found)}")
    if torch.device(vllm_config.device_config.device).type == "cpu":
        order_top_log_probs()


@cache
def _keep_triton_operators_away() -> None:
    """vLLM's mode puts Triton kernels in the place of torch's softmax and mean, on a CPU too, where none runs."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.determinism import batch_invariant

    from qnext_vllm import ARCHITECTURES

    original = batch_invariant.enable_batch_invariant_mode

    def enable_batch_invariant_mode() -> None:
        served = get_current_vllm_config().model_config.architectures
        if not ARCHITECTURES.keys() & set(served):
            original()

    batch_invariant.enable_batch_invariant_mode = enable_batch_invariant_mode


@cache
def order_top_log_probs() -> None:
    """torch.topk orders equal log-probabilities by the largest number that a request of the batch asks for."""
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.sample.sampler import Sampler

    original = Sampler.gather_logprobs

    def gather_logprobs(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> LogprobsTensors:
        chosen = original(logprobs, 0, token_ids)
        values, indices = largest_first(logprobs, num_logprobs)
        return LogprobsTensors(
            torch.cat([chosen.logprob_token_ids, indices.to(torch.int32)], dim=1),
            torch.cat([chosen.logprobs, values], dim=1),
            chosen.selected_token_ranks,
        )

    Sampler.gather_logprobs = staticmethod(gather_logprobs)
