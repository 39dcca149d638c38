"""FlashInfer's ``cutlass_fused_moe`` by its documentation, in plain PyTorch, where there is no GPU for it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext_kernels import experts, experts_fp8, force_backend
from qnext_kernels.moe.flashinfer import FlashInferMoe


def cutlass_fused_moe(
    input: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: list[Tensor],
    *,
    output: Tensor,
    use_deepseek_fp8_block_scale: bool,
    use_fused_finalize: bool,
) -> Tensor:
    """Each expert's up projection first; ids beyond the experts are left out; tensors are read as contiguous."""
    weights = fc1_expert_weights, fc2_expert_weights, *quant_scales
    for tensor in (input, token_selected_experts, token_final_scales, *weights, output):
        assert tensor.is_contiguous()
    assert token_selected_experts.dtype == torch.int32
    assert token_final_scales.dtype == torch.float32
    assert use_deepseek_fp8_block_scale == (fc1_expert_weights.dtype == torch.float8_e4m3fn)
    assert len(quant_scales) == 2 * use_deepseek_fp8_block_scale
    assert output_dtype == output.dtype == input.dtype

    def gate_first(both: Tensor) -> Tensor:
        up, gate = both.chunk(2, dim=1)
        return torch.cat([gate, up], dim=1)

    choice = token_final_scales, token_selected_experts
    w13, w2 = gate_first(fc1_expert_weights), fc2_expert_weights
    with force_backend("moe=reference"):
        if quant_scales:
            out = experts_fp8(input, w13, gate_first(quant_scales[0]), w2, quant_scales[1], *choice)
        else:
            out = experts(input, w13, w2, *choice)
    return output.copy_(out)


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Let the stand-in serve, as on a GPU of compute capability 9.0 with CUDA 12.8."""
    library: Any = ModuleType("flashinfer.fused_moe")
    library.cutlass_fused_moe = cutlass_fused_moe
    patch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    patch.setitem(sys.modules, "flashinfer.fused_moe", library)
    patch.setattr(FlashInferMoe, "supports", lambda self, device, dtype: None)
    patch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    patch.setattr(torch.version, "cuda", "12.8")
