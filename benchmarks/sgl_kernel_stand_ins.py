"""Operators of sglang-kernel 0.4.10 in Python, in place of its libraries, which want another PyTorch than 2.11.

A thin wheel has this as ``sgl_kernel/load_utils.py``. What SGLang calls to serve Qwen3-Next without quantization is
SGLang's own: its kernels in Triton, and those in CUDA C++ that it compiles itself. Any other operator is missing.
"""

import torch
from torch import Tensor

LIBRARY = torch.library.Library("sgl_kernel", "DEF")
SCHEMAS = {
    "gemma_rmsnorm": "(Tensor! out, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()",
    "gemma_fused_add_rmsnorm": "(Tensor! input, Tensor! residual, Tensor weight, float eps, bool enable_pdl) -> ()",
    "moe_sum_reduce": "(Tensor input, Tensor! output, float routed_scaling_factor) -> ()",
    "moe_align_block_size": (
        "(Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_token_ids, Tensor! experts_ids, "
        "Tensor! num_tokens_post_pad, Tensor! cumsum_buffer, bool pad_sorted_token_ids, bool ignore_invalid_expert)"
        " -> ()"
    ),
    "weak_ref_tensor": "(Tensor(a) tensor) -> Tensor(a)",
}
_one_plus: dict[int, Tensor] = {}


def one_plus(weight: Tensor) -> Tensor:
    """1 + weight in the dtype of weight, made once for each weight: the kernels multiply with what they are given."""
    if (found := _one_plus.get(weight.data_ptr())) is None:
        found = _one_plus[weight.data_ptr()] = (1.0 + weight.float()).to(weight.dtype)
    return found


def gemma_rmsnorm(out: Tensor, input: Tensor, weight: Tensor, eps: float, enable_pdl: bool) -> None:
    from sglang.kernels.ops.layernorm.norm import rmsnorm

    width = input.shape[-1]
    rmsnorm(input.reshape(-1, width), one_plus(weight), out.view(-1, width), eps)


def gemma_fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float, enable_pdl: bool) -> None:
    from sglang.kernels.ops.layernorm.norm import fused_add_rmsnorm

    fused_add_rmsnorm(input, residual, one_plus(weight), eps)


def moe_sum_reduce(input: Tensor, output: Tensor, routed_scaling_factor: float) -> None:
    from sglang.kernels.ops.moe.fused_moe_triton_kernels import moe_sum_reduce_triton

    moe_sum_reduce_triton(input, output, routed_scaling_factor)


def moe_align_block_size(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    cumsum_buffer: Tensor,
    pad_sorted_token_ids: bool,
    ignore_invalid_expert: bool,
) -> None:
    from sglang.kernels.ops.moe import moe_align

    if ignore_invalid_expert:
        raise NotImplementedError("moe_align_block_size: ignore_invalid_expert")
    blocks = sorted_token_ids, experts_ids, num_tokens_post_pad, cumsum_buffer
    moe_align.moe_align_block_size(topk_ids, num_experts, block_size, *blocks, pad_sorted_token_ids)


def weak_ref_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself: graphs keep their outputs alive."""
    return tensor


def _load_architecture_specific_ops() -> None:
    """What ``sgl_kernel`` calls when it is imported."""
    for name, schema in SCHEMAS.items():
        LIBRARY.define(f"{name}{schema}")
        LIBRARY.impl(name, globals()[name], "CompositeExplicitAutograd")


def _preload_cuda_library() -> None:
    """PyTorch has loaded it."""
