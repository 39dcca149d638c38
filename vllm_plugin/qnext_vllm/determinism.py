"""The deterministic mode in vLLM: ``QNEXT_DETERMINISTIC=1``, and on a CPU ``VLLM_BATCH_INVARIANT=1`` means the same.

Our kernels are batch invariant as they are. What is left to do is to refuse what they do not serve, to keep vLLM's own
mode, which is made of Triton kernels, out of a CPU, and to give a row's top log-probabilities one order.
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

    if envs.VLLM_BATCH_INVARIANT:
        set_deterministic(True)
        _keep_triton_operators_away()


def obstacles(vllm_config: Any) -> list[str]:
    """What of this configuration would run on operators that are not batch invariant."""
    from qnext_vllm.attention import attention_backend
    from qnext_vllm.gated_delta_net import state_dtypes

    model = vllm_config.model_config
    device, dtype = torch.device(vllm_config.device_config.device), model.dtype
    cache_dtype, (_, state_dtype) = vllm_config.cache_config.cache_dtype, state_dtypes(vllm_config)
    found = {
        f"{model.quantization} weights": vllm_config.quant_config is not None,
        f"a head in {model.head_dtype} beside {dtype}": model.head_dtype not in (None, dtype),
        "LoRA adapters": vllm_config.lora_config is not None,
        f"--kv-cache-dtype {cache_dtype} beside {dtype}": attention_backend(cache_dtype, dtype, device) is None,
        f"--mamba-ssm-cache-dtype {state_dtype}": state_dtype != torch.float32,
    }
    return [name for name, there in found.items() if there]


def prepare(vllm_config: Any) -> None:
    """Make this process ready for the mode, if it is on.

    Raises:
        DeterminismError: this configuration is not served in it.
    """
    if not is_deterministic():
        return
    if found := obstacles(vllm_config):
        raise DeterminismError(f"qnext-plugins: the deterministic mode does not serve {', '.join(found)}")
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
