"""What SGLang does with Triton or CUDA kernels on the way to a token, hooked to PyTorch on a plain CPU."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any

from sglang.srt.mem_cache.allocation import get_last_loc_torch

from qnext_sglang.cpu import sampling, speculation
from qnext_sglang.cpu.attention import CpuAttentionBackend, CpuMultiStepBackend
from qnext_sglang.cpu.platform import ATTENTION_BACKEND
from qnext_sglang.hooks import Hook


def _pin_memory(tensor: Any, device: Any = None) -> Any:
    """The prefix cache pins a mask without asking; without an accelerator PyTorch refuses."""
    return tensor


def _no_triton_operators(enable_bmm: bool = True) -> None:
    """SGLang's deterministic mode puts Triton kernels in the place of torch's operators; the model has its own."""


def _new_tokens_that_fit(
    original: Callable[..., int | None],
    allocator: Any,
    input_tokens: int,
    max_new_tokens: int,
    *,
    token_capacity: int,
    sliding_window_size: int | None,
    chunk_size: int | None,
) -> int | None:
    """None, which ends the request with an error: beside its prompt SGLang keeps a page free, and would wait for it."""
    if input_tokens + allocator.page_size >= token_capacity:
        return None
    limits = {"sliding_window_size": sliding_window_size, "chunk_size": chunk_size}
    return original(allocator, input_tokens, max_new_tokens, token_capacity=token_capacity, **limits)


def _draft_decode_backend(original: Callable[..., Any], factory: Any) -> Any:
    if factory.speculative_num_steps <= 1:
        return None
    return CpuMultiStepBackend(factory.draft_model_runner, factory.speculative_num_steps)


def _draft_extend_backend(original: Callable[..., Any], factory: Any) -> Any:
    backend = CpuAttentionBackend(factory.draft_model_runner)
    backend.prefill_attention_backend_str = backend.decode_attention_backend_str = ATTENTION_BACKEND
    return backend


_OPS = "sglang.kernels.ops.speculative"
_DRAFT = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
HOOKS = [
    Hook("torch.Tensor.pin_memory", _pin_memory),
    Hook("sglang.srt.batch_invariant_ops.enable_batch_invariant_mode", _no_triton_operators),
    Hook("sglang.kernels.ops.sampling.murmur_hash.murmur_hash32", sampling.murmur_hash32),
    Hook("sglang.srt.mem_cache.allocation.get_last_loc", get_last_loc_torch),
    Hook(
        "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.max_new_tokens_for_memory",
        _new_tokens_that_fit,
        around=True,
    ),
    Hook("sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func", speculation.assign_req_to_token_pool_func),
    Hook(
        f"{_OPS}.cache_locs.assign_draft_cache_locs_contiguous_func",
        speculation.assign_draft_cache_locs_contiguous_func,
    ),
    Hook(f"{_OPS}.spec_tree.build_tree_kernel_efficient_func", speculation.build_tree_kernel_efficient_func),
    Hook(f"{_OPS}.spec_tree.verify_tree_greedy_func", speculation.verify_tree_greedy_func),
    Hook(f"{_OPS}.eagle.fill_bonus_tokens_func", speculation.fill_bonus_tokens_func),
    Hook(f"{_DRAFT}.create_decode_backend", _draft_decode_backend, around=True),
    Hook(f"{_DRAFT}.create_draft_extend_backend", _draft_extend_backend, around=True),
]
# None without CUDA, so that SGLang's registry, which finds importers by identity, cannot replace them.
NAMES = {
    f"sglang.srt.speculative.eagle_utils.{function.__name__}": function
    for function in (
        speculation.top_k_renorm_prob,
        speculation.top_p_renorm_prob,
        speculation.tree_speculative_sampling_target_only,
    )
}


def install_names() -> None:
    """Set :data:`NAMES` and the attention backend.

    Raises:
        LookupError: a name does not exist.
    """
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(ATTENTION_BACKEND)(CpuAttentionBackend)
    for target, function in NAMES.items():
        module, _, name = target.rpartition(".")
        owner = pkgutil.resolve_name(module)
        if not hasattr(owner, name):
            raise LookupError(f"this SGLang has no {target}")
        setattr(owner, name, function)
