"""The routed experts in FlashInfer: ``cutlass_fused_moe``, over weights laid out for it in place."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext_kernels.dispatch import BackendError, Call
from qnext_kernels.flashinfer_support import FlashInferBackend
from qnext_kernels.fp8 import FP8_GROUP, expect_quantized
from qnext_kernels.moe.triton import TritonMoe
from qnext_kernels.triton_support import aligned_rows

CAPABILITIES = ((9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1))
FP8_CUDA = (12, 8)
WHOLE = 8
"""Sizes are multiples of it, in 16 bits: rows of 16 bytes."""


class FlashInferMoe(FlashInferBackend, TritonMoe):
    """Experts whose weights :func:`qnext_kernels.pack_experts_` has packed: each up projection before its gate.

    Everything else is Triton's: the router, SwiGLU, weights as the checkpoint stores them, and with them the shared
    expert in the same launches. Ids of −1 are left out by FlashInfer, too. Its sum over a token's experts is asked for
    in a launch of its own, in one order; the one within the second product adds up as results come.
    """

    batch_invariant = False

    def supports_call(self, device: torch.device, dtype: torch.dtype, call: Call) -> str | None:
        """``call.shape`` has the sizes of the weights but their number, of those that are known."""
        capability = torch.cuda.get_device_capability(device.index)
        if capability not in CAPABILITIES:
            return f"has no experts for compute capability {_joined(capability)}"
        whole = WHOLE
        if call.method == "experts_fp8":
            whole = FP8_GROUP
            if dtype != torch.bfloat16:
                return f"takes block-wise FP8 with activations in torch.bfloat16, got {dtype}"
            if capability != (9, 0):
                return f"takes block-wise FP8 on compute capability 9.0, got {_joined(capability)}"
            if tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2])) < FP8_CUDA:
                return f"takes block-wise FP8 with CUDA 12.8 and more, got {torch.version.cuda}"
        if any(size % whole for size in call.shape):
            return f"needs sizes that are multiples of {whole}, got {', '.join(map(str, call.shape))}"
        return None

    def pack_experts_(self, *weights: Tensor, shared: tuple[Tensor, Tensor] | None = None) -> bool:
        """Exchange gate and up projections in place, of weights or of their scales.

        False where strides forbid it, or for a shared expert, which FlashInfer does not compute along.
        """
        if shared is not None or not all(weight.is_contiguous() for weight in weights):
            return False
        exchange_halves_(*weights[: len(weights) // 2])
        return True

    def unpack_experts_(self, *weights: Tensor, shared: None = None) -> None:
        exchange_halves_(*weights[: len(weights) // 2])

    def experts_packed(self, x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return fused_experts(x, w13, w2, topk_weights, topk_ids)

    def experts_scaled_packed(
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
        expect_quantized(self.name, quantize)
        if shared is not None:
            raise BackendError(f"shared: backend {self.name} does not compute a shared expert along")
        return fused_experts(x, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale)


def exchange_halves_(*tensors: Tensor) -> None:
    """Exchange both halves of the rows of every expert [E, 2·N, …] in place, one expert after the other."""
    for tensor in tensors:
        for expert in tensor:
            gate, up = expert.chunk(2)
            kept = gate.clone()
            gate.copy_(up)
            up.copy_(kept)


def fused_experts(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, *block_scales: Tensor
) -> Tensor:
    """:func:`qnext_kernels.experts`, or with the scales of both weights ``experts_fp8``, over packed weights."""
    from flashinfer.fused_moe import cutlass_fused_moe

    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    with torch.cuda.device_of(x):
        cutlass_fused_moe(
            input=aligned_rows(x.contiguous()),
            token_selected_experts=topk_ids.int().contiguous(),
            token_final_scales=topk_weights.contiguous(),
            fc1_expert_weights=w13,
            fc2_expert_weights=w2,
            output_dtype=x.dtype,
            quant_scales=list(block_scales),
            output=out,
            use_deepseek_fp8_block_scale=bool(block_scales),
            use_fused_finalize=False,
        )
    return out


def _joined(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
