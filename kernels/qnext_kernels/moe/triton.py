"""The mixture of experts in Triton: routing, sorting the choices, two grouped products with SwiGLU between, a sum."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import is_deterministic
from qnext_kernels.fp8 import expect_quantized
from qnext_kernels.layouts import once_per_layout
from qnext_kernels.moe.configurations import Configuration, Few, Shape, choose, few
from qnext_kernels.operators import operator
from qnext_kernels.triton_support import Target, TritonBackend, aligned_rows, current_target


class TritonMoe(TritonBackend):
    """Products of weights in bfloat16, float16 or float32, and of weights in FP8, with sums in float32.

    Two launches for a few tokens, four up to some fifty and five for more; with FP8, activations are quantized in two
    more where tokens are not few. Nothing is read on the host and every grid follows from shapes, so that a CUDA graph
    can capture each call.
    What is rounded: the product behind SwiGLU and the result of each expert, to the dtype of ``x``.

    Every sum runs in one order, and an element's does not depend on which rows it shares a block with. How many rows a
    block has depends on the number of tokens, and with it the instruction that multiplies; a few tokens need none. In
    the deterministic mode every call runs the same compiled products, and a token's bits depend on nothing but it.

    The tests compile it for GPUs of NVIDIA and AMD and run it in Triton's interpreter and on the GPU at hand; block
    sizes were measured on an H200.
    """

    batch_invariant = True

    def topk_softmax(self, router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        return triton_topk_softmax(router_logits, top_k, renormalize)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        return triton_silu_and_mul(x)

    def experts(self, x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return self.experts_with_shared(x, w13, w2, topk_weights, topk_ids, None)

    def experts_with_shared(
        self,
        x: Tensor,
        w13: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared: tuple[Tensor, Tensor, Tensor] | None,
    ) -> Tensor:
        from qnext_kernels.moe.triton_experts import Call, Shared, Weights, matrices
        from qnext_kernels.moe.triton_few import run_few

        if x.numel() == 0:
            return torch.empty_like(x, memory_format=torch.contiguous_format)
        extra = None
        if shared is not None:
            extra = Shared(Weights(*map(matrices, shared[:2])), shared[2].contiguous())
        x, topk_weights, topk_ids = aligned_rows(x), topk_weights.contiguous(), topk_ids.contiguous()
        with torch.cuda.device_of(x):
            target = current_target()
            config = configuration(x, w2, topk_ids, target)
            weights = Weights(matrices(w13), matrices(w2))
            if isinstance(config, Few):
                return run_few(x, weights, extra, topk_weights, topk_ids, config, target)
            call = Call(x, weights, extra, topk_weights, topk_ids, config, target)
            return call.sum(call.down(call.up(x)))

    def experts_scaled(
        self,
        x: Tensor,
        w13: Tensor,
        w13_scale: Tensor,
        w2: Tensor,
        w2_scale: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None,
        quantize: bool,
    ) -> Tensor:
        from qnext_kernels.moe.triton_experts import Shared, Weights, matrices
        from qnext_kernels.moe.triton_fp8 import run_fp8

        expect_quantized(self.name, quantize)

        if x.numel() == 0:
            return torch.empty_like(x, memory_format=torch.contiguous_format)
        routed = Weights(matrices(w13), matrices(w2), matrices(w13_scale), matrices(w2_scale))
        extra = None
        if shared is not None:
            up, up_scale, down, down_scale, gate = shared
            weights = Weights(matrices(up), matrices(down), matrices(up_scale), matrices(down_scale))
            extra = Shared(weights, gate.contiguous())
        with torch.cuda.device_of(x):
            target = current_target()
            config = configuration(x, w2, topk_ids, target)
            tokens = aligned_rows(x), topk_weights.contiguous(), topk_ids.contiguous()
            return run_fp8(tokens[0], routed, extra, *tokens[1:], config, target)


@once_per_layout
def configuration(x: Tensor, w2: Tensor, topk_ids: Tensor, target: Target) -> Configuration | Few:
    """The configuration of a call: for few tokens, measured on this GPU, or by rule.

    In the deterministic mode no bit may depend on how many tokens there are, and few are not treated apart.
    """
    tokens, top_k = topk_ids.shape
    num_experts, hidden, middle = w2.shape
    shape = Shape(num_experts, hidden, middle, top_k, str(w2.dtype).removeprefix("torch."))
    if not is_deterministic() and (found := few(shape, tokens, target)) is not None:
        return found
    return choose(shape, tokens, target, gpu_name(x), deterministic=is_deterministic())


def gpu_name(x: Tensor) -> str | None:
    """The name of the GPU that a tensor lies on, None where Triton interprets."""
    return torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else None


def _empty_choice(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    tokens, device = router_logits.shape[0], router_logits.device
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
    return weights, torch.empty(tokens, top_k, dtype=torch.int32, device=device)


@operator(_empty_choice)
def triton_topk_softmax(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """:func:`qnext_kernels.topk_softmax`; of equal probabilities, that of the lower index comes first."""
    from qnext_kernels.moe.triton_router import run_topk_softmax

    weights, ids = _empty_choice(router_logits, top_k, renormalize)
    with torch.cuda.device_of(router_logits):
        run_topk_softmax(router_logits, weights, ids, renormalize)
    return weights, ids


def _empty_half(x: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device)


@operator(_empty_half)
def triton_silu_and_mul(x: Tensor) -> Tensor:
    """:func:`qnext_kernels.silu_and_mul`."""
    from qnext_kernels.moe.triton_router import run_silu_and_mul

    out = _empty_half(x)
    with torch.cuda.device_of(x):
        run_silu_and_mul(x, out)
    return out
