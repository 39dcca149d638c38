"""What vLLM leaves to Inductor: norms and gates, compiled as inside its models."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNormGated
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.qwen3_next import Qwen3NextAttention
from vllm.platforms import current_platform

from qnext_plugins.cli.bench.inputs import ROPE_THETA, Library

logging.getLogger("vllm").setLevel(logging.ERROR)
current_platform.import_kernels()
_config = VllmConfig()  # the defaults of ``vllm serve``: torch.compile with Inductor, custom operators off
# As vLLM's worker does: Inductor sees the norms instead of calling them as operators that PyTorch runs.
ir.set_default_torch_wrap(_config.compilation_config.ir_enable_torch_wrap)
_config.kernel_config.ir_op_priority.set_default()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as Inductor compiles it inside vLLM's model; mark dimension 0 of its inputs as dynamic."""
    return torch.compile(function, options=dict(_config.compilation_config.inductor_compile_config))


def module(make: Callable[[], nn.Module], weight: Tensor) -> nn.Module:
    """A layer of vLLM in the dtype of its weight."""
    with set_current_vllm_config(_config):
        module = make().to(weight.dtype)
    module.weight.data = weight
    return module


class InductorPeers(Library):
    """The elementwise operations of vLLM on any device."""

    name = "vLLM"

    def __init__(self, version: str) -> None:
        self.version = version

    def rms_norm(self, weight: Tensor, eps: float) -> tuple[str, Callable[..., Any]]:
        return inductor("GemmaRMSNorm", module(lambda: GemmaRMSNorm(weight.shape[0], eps=eps), weight))

    def gated_rms_norm(self, weight: Tensor, eps: float) -> tuple[str, Callable[..., Any]]:
        make = partial(RMSNormGated, weight.shape[0], eps=eps, norm_before_gate=True)
        return inductor("RMSNormGated", module(make, weight))

    def silu_and_mul(self) -> tuple[str, Callable[..., Any]]:
        with set_current_vllm_config(_config):
            return inductor("SiluAndMul", SiluAndMul(compile_native=False))

    def sigmoid_gate(self) -> tuple[str, Callable[..., Any]]:
        # As the forward pass of vLLM's model writes it.
        return inductor("torch.sigmoid", lambda x, gate: x * torch.sigmoid(gate))

    def qk_norm_rope_gate(
        self, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int, rotary_dim: int, positions: int, eps: float
    ) -> tuple[str, Callable[..., Any]]:
        dim = q_weight.shape[0]
        rope = {"rope_type": "default", "rope_theta": ROPE_THETA, "partial_rotary_factor": rotary_dim / dim}
        with set_current_vllm_config(_config):
            rotary = get_rope(head_size=dim, max_position=positions, rope_parameters=rope, dtype=q_weight.dtype)
        layer = SimpleNamespace(
            use_fused_qk_norm_rope_gate=False,  # a Triton kernel of GPUs
            attn_output_gate=True,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            q_size=heads * dim,
            kv_size=kv_heads * dim,
            q_norm=module(lambda: GemmaRMSNorm(dim, eps=eps), q_weight),
            k_norm=module(lambda: GemmaRMSNorm(dim, eps=eps), k_weight),
            rotary_emb=rotary,
        )
        run = partial(Qwen3NextAttention._project_qkv_gate, layer)
        return inductor("Qwen3NextAttention", lambda qkv, positions: run(qkv, positions))

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(function)


def inductor(name: str, function: Callable[..., Any]) -> tuple[str, Callable[..., Any]]:
    """A peer of :class:`Library`: its name, and the function compiled."""
    return f"{name} (Inductor)", compiled(function)
