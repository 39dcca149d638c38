"""The deterministic mode in SGLang: ``--enable-deterministic-inference``, on a CPU ``QNEXT_DETERMINISTIC=1`` too.

Our kernels are batch invariant as they are, and SGLang's own mode makes the sampler treat a greedy request alike among
others that sample. On a GPU that mode also makes linears, head and attention invariant, which are SGLang's there. What
is left to do is to refuse what neither keeps, and to draw and to settle ties by the row alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.configs.mamba_utils import mamba2_state_dtype
from sglang.srt.layers.sampler import sampling_from_probs_torch
from torch import Tensor

from qnext_kernels.dispatch import is_deterministic, set_deterministic
from qnext_plugins.largest import largest_first
from qnext_sglang import serving
from qnext_sglang.experts import obstacle
from qnext_sglang.hooks import Hook, install
from qnext_sglang.quantization import ours_on_cpu


class DeterminismError(RuntimeError):
    """The deterministic mode is asked for and cannot be served; the message says what stands against it."""


def obstacles(server_args: Any, hf_config: Any, quant_config: Any) -> list[str]:
    """What of this configuration would run on operators that are not batch invariant."""
    device, linears, experts = serving.device(), server_args.bf16_gemm_backend, None
    if device.type != "cpu" and quant_config is None:
        experts = obstacle(None, 0, device, torch.get_default_dtype())
    cache, state = server_args.kv_cache_dtype, mamba2_state_dtype(hf_config).temporal
    found = {
        "quantized weights": quant_config is not None and not ours_on_cpu(quant_config),
        "--enable-fp32-lm-head": server_args.enable_fp32_lm_head,
        f"--kv-cache-dtype {cache}": cache not in ("auto", "bf16", "bfloat16"),
        f"--mamba-ssm-dtype {state}": state != torch.float32,
        # Those that SGLang does not refuse choose their kernel by the number of tokens.
        f"--bf16-gemm-backend {linears}": device.type != "cpu" and linears not in ("auto", "torch"),
        f"SGLang's own experts ({experts})": experts is not None,
    }
    return [name for name, there in found.items() if there]


def prepare(server_args: Any, hf_config: Any, quant_config: Any) -> None:
    """Turn the mode on in this process where a flag asks for it, and make the process ready for it.

    Raises:
        DeterminismError: this configuration is not served in the mode, or a GPU's lacks SGLang's own.
        LookupError: this SGLang lacks a function that is hooked for it.
    """
    if server_args.enable_deterministic_inference:
        set_deterministic(True)
    if not is_deterministic():
        return
    if serving.device().type != "cpu" and not server_args.enable_deterministic_inference:
        raise DeterminismError(
            "qnext-plugins: on a GPU the deterministic mode needs SGLang's own with it, "
            "which --enable-deterministic-inference turns on"
        )
    if found := obstacles(server_args, hf_config, quant_config):
        raise DeterminismError(f"qnext-plugins: the deterministic mode does not serve {', '.join(found)}")
    install(HOOKS)


class _Ordered:
    """Stands for log-probabilities where SGLang asks for their topk alone."""

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs

    def topk(self, count: int, dim: int) -> tuple[Tensor, Tensor]:
        return largest_first(self.log_probs, count)


def _top_log_probs(
    original: Callable[..., Any],
    logprobs: Tensor,
    top_logprobs_nums: Any,
    stage: Any,
    extend_logprob_pruned_lens_cpu: Any = None,
    no_copy_to_cpu: bool = False,
) -> Any:
    """torch.topk orders equal log-probabilities by the largest number that a request of the batch asks for."""
    return original(_Ordered(logprobs), top_logprobs_nums, stage, extend_logprob_pruned_lens_cpu, no_copy_to_cpu)


def _top_log_probs_of_chunk(
    original: Callable[..., Any],
    logprobs: Tensor,
    top_k_nums: Any,
    pruned_lens: Any,
    top_logprobs_val: Any,
    top_logprobs_idx: Any,
    split_pruned_len: int,
    log_normalizer: Any = None,
    precomputed_topk: Any = None,
    copy_to_pinned_cpu: bool = False,
) -> Any:
    """The same for a prompt's tokens."""
    arguments = (top_k_nums, pruned_lens, top_logprobs_val, top_logprobs_idx, split_pruned_len)
    return original(_Ordered(logprobs), *arguments, log_normalizer, precomputed_topk, copy_to_pinned_cpu)


def _preprocess(original: Callable[..., Any], sampler: Any, logits: Tensor, sampling_info: Any) -> Tensor:
    """Keep the best token of every row, which softmax may make equal to the next one."""
    logits = original(sampler, logits, sampling_info)
    if not sampling_info.is_all_greedy:
        sampling_info.qnext_best = logits.argmax(dim=-1)
    return logits


def _sample(
    original: Callable[..., Any],
    sampler: Any,
    probs: Tensor,
    sampling_info: Any,
    positions: Tensor,
    simple_sampling_case: bool,
) -> Any:
    """Draw for each row as for a batch of it alone.

    If any request of the batch has a top-k, top-p or min-p, SGLang's noise belongs to ranks instead of tokens for all.
    It also ends with an assertion where a seed meets min-p.
    """
    info = copy.copy(sampling_info)
    if info.need_min_p_sampling:
        probs = torch.where(probs < probs.amax(dim=1, keepdim=True) * info.min_ps.view(-1, 1), 0.0, probs)
        info.need_min_p_sampling = False
    tokens, capture = original(sampler, probs, info, positions, simple_sampling_case)
    if not simple_sampling_case:
        rows = ((info.top_ks >= probs.shape[1]) & (info.top_ps >= 1.0)).nonzero().squeeze(1)
        tokens[rows] = sampling_from_probs_torch(probs[rows], info.sampling_seed[rows], positions[rows])
    return torch.where(info.top_ks == 1, info.qnext_best.to(tokens.dtype), tokens), capture


_LOG_PROBS, _SAMPLER = "sglang.srt.layers.logprob_processor", "sglang.srt.layers.sampler.Sampler"
HOOKS = [
    Hook(f"{_LOG_PROBS}.get_top_logprobs_raw", _top_log_probs, around=True),
    Hook(f"{_LOG_PROBS}.get_top_logprobs_chunk", _top_log_probs_of_chunk, around=True),
    Hook(f"{_SAMPLER}._preprocess_logits", _preprocess, around=True),
    Hook(f"{_SAMPLER}._sample_from_probs", _sample, around=True),
]
