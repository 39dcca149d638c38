"""Small random models of transformers, the numerical referee."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRotaryEmbedding

MAX_POSITION = 256
GROUP_OF_TWO: dict[str, Any] = {"attention_bias": False}
GROUP_OF_THREE: dict[str, Any] = {
    "attention_bias": True,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "norm_topk_prob": False,
}


def small_config(**overrides: Any) -> Qwen3NextConfig:
    """Three linear layers, the second of them dense, and a full-attention layer."""
    values: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
        "mlp_only_layers": [1],
        "max_position_embeddings": MAX_POSITION,
        "eos_token_id": 0,
    }
    return Qwen3NextConfig(**values | overrides)


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Give every parameter values that matter: matrix rows of about unit length, norms off their neutral weight."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.2)


def small_model(config: Qwen3NextConfig, *, seed: int = 0) -> Qwen3NextForCausalLM:
    torch.manual_seed(seed)
    model = Qwen3NextForCausalLM(config).float().eval()
    randomize(model)
    return model


def rotary_table(config: Qwen3NextConfig) -> Tensor:
    """[max_position, rotary_dim]: cosines, then sines."""
    cos, sin = Qwen3NextRotaryEmbedding(config)(torch.empty(0), torch.arange(MAX_POSITION)[None])
    half = cos.shape[-1] // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=1)


@torch.no_grad()
def assert_as_close_as_rounding(actual: Tensor, referee: nn.Module, run: Callable[[Any], Tensor]) -> None:
    """Compare rows [T, D] with those of ``run(referee)``; a row may differ by what roundings do to the referee's."""
    # No fixed tolerance serves: a norm over a small output of the delta rule enlarges its rounding errors, and a router
    # steps from one expert to the next. So the referee itself says how firm each row is: how far it moves when every
    # parameter moves by at most eps. Ours rounds every intermediate value, not only the parameters: 8 times that.
    expected = run(referee)
    movement = torch.zeros(len(expected), 1)
    for _ in range(4):
        moved = copy.deepcopy(referee)
        for parameter in moved.parameters():
            parameter.mul_(1 + torch.finfo(parameter.dtype).eps * (2 * torch.rand_like(parameter) - 1))
        movement = torch.maximum(movement, (run(moved) - expected).abs().amax(dim=1, keepdim=True))
    error = (actual - expected).abs()
    assert (error <= 8 * movement).all(), f"rows off by {(error / movement).amax(dim=1).tolist()} movements"
    assert float(movement.median()) < 1e-4 * float(expected.abs().max()), "the referee is too loose to compare with"
