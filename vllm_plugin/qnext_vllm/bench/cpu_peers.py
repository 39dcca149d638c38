"""vLLM's own CPU operations, called as its in-tree Qwen3-Next calls them.

Which kernel runs depends on the processor. Wherever vLLM itself decides (experts, convolution, attention, linears), its
own deciding code runs here too, and the name that comes back says what it chose.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import vllm._custom_ops as ops
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts, X86CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.router.cpu_router import _softmax_topk
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from qnext_plugins.cli.bench.inputs import BLOCK_SIZE
from qnext_vllm.bench.inductor_peers import InductorPeers, inductor


def experts(w13: Tensor, w2: Tensor) -> tuple[str, Callable[..., None]]:
    """The grouped matrix products of the routed experts over repacked weights: f(out, x, weights, ids)."""
    kinds = (X86CPUUnquantizedExperts, CPUUnquantizedExperts)
    isa = next(kind.isa for kind in kinds if kind._supports_current_device())
    w13, w2 = ops.cpu_prepack_moe_weight(w13, isa), ops.cpu_prepack_moe_weight(w2, isa)

    def run(out: Tensor, x: Tensor, weights: Tensor, ids: Tensor) -> None:
        ops.cpu_fused_moe(out, x, w13, w2, None, None, weights, ids, "silu", isa)

    return f"cpu_fused_moe ({isa})", run


class PagedAttention:
    """CPU_ATTN over a paged cache of one sequence: ``queries`` tokens at the end of ``context``."""

    def __init__(self, key: Tensor, value: Tensor, queries: int, heads: int) -> None:
        context, kv_heads, dim = key.shape
        self.isa = _get_attn_isa(key.dtype, BLOCK_SIZE, dim)
        self.name = f"CPU_ATTN ({self.isa})"
        blocks = -(-context // BLOCK_SIZE)
        cache = torch.zeros(blocks + 1, kv_heads, 2 * BLOCK_SIZE, dim, dtype=key.dtype)
        self.caches = cache.chunk(2, dim=2)
        slots = torch.arange(BLOCK_SIZE, BLOCK_SIZE + context)
        ops.cpu_attn_reshape_and_cache(key, value, *self.caches, slots, self.isa)
        self.block_table = torch.arange(1, blocks + 1, dtype=torch.int32)[None]
        self.lengths = torch.tensor([context], dtype=torch.int32)
        self.starts = torch.tensor([0, queries], dtype=torch.int32)
        self.shape = (heads, kv_heads, dim)
        self.schedule()

    def schedule(self) -> None:
        """Divide the work among the threads, as vLLM does once a step for all layers."""
        self.metadata = ops.cpu_attn_get_scheduler_metadata(
            1, *self.shape, self.lengths, torch.bfloat16, self.starts, True, -1, self.isa, True
        )

    def __call__(self, query: Tensor, out: Tensor) -> Tensor:
        scale = self.shape[2] ** -0.5
        rest = (self.starts, self.lengths, scale, True, None, -1, self.block_table, 0.0, self.metadata, None)
        ops.cpu_attention_with_kv_cache(query, *self.caches, out, *rest)
        return out


def linear(weight: Tensor) -> tuple[str, Callable[[Tensor], Tensor]]:
    """An unquantized linear layer [N, K]: f(x)."""
    layer: Any = nn.Module()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    name = layer.cpu_linear.__code__.co_names[-1]
    if name == "linear":
        name = "F.linear (oneDNN: no bf16 here)"
    return name, lambda x: layer.cpu_linear(x, layer.weight, None)


class DeltaNetLayer:
    """What vLLM's CPU functions of Gated DeltaNet read of a layer; ``conv_pool`` is [slots, state_len, channels].

    Its convolution is not a function of its own: the methods run vLLM's layer up to where the delta rule would begin.
    """

    class _Convolved(Exception):  # noqa: N818 (no error: it carries a result)
        pass

    def __init__(self, conv_weight: Tensor, conv_pool: Tensor, heads: tuple[int, int, int]) -> None:
        key_heads, value_heads, dim = heads
        conv1d: Any = nn.Module()
        conv1d.weight = nn.Parameter(conv_weight[:, None].clone(), requires_grad=False)
        conv1d.bias = None
        dispatch_cpu_unquantized_gemm(conv1d, remove_weight=False)
        self.conv1d = conv1d
        self.activation, self.tp_size = "silu", 1
        self.key_dim, self.value_dim, self.head_k_dim, self.head_v_dim = key_heads * dim, value_heads * dim, dim, dim
        self.kv_cache = (conv_pool, conv_pool.new_empty(1, 1, 1, 1))

    @staticmethod
    def name(call: Callable[[], Any]) -> str:
        """The operator behind a call of this layer: vLLM's C++ or PyTorch's convolution."""
        with _Convolutions() as seen:
            call()
        return " + ".join(sorted(seen.names))

    def rearrange_mixed_qkv(self, convolved: Tensor) -> None:
        """Stop, with what the convolution made; vLLM calls this between convolution and delta rule."""
        raise self._Convolved(convolved)

    def convolve(self, x: Tensor, slots: Tensor, starts: Tensor | None, speculation: bool) -> Tensor:
        """Prefill sequences that begin at ``starts`` [N + 1], or decode one token each where that is None."""
        decodes = 0 if starts is not None else len(slots)
        metadata = SimpleNamespace(
            spec_sequence_masks=None,
            num_accepted_tokens=None,
            non_spec_state_indices_tensor=slots,
            non_spec_query_start_loc=torch.arange(decodes + 1, dtype=torch.int32) if starts is None else starts,
            num_decodes=decodes,
            num_decode_tokens=decodes,
            num_prefills=len(slots) - decodes,
            num_prefill_tokens=x.shape[0] - decodes,
            has_initial_state=torch.zeros(len(slots), dtype=torch.bool),
        )
        nothing = x[:, :0]
        try:
            if speculation:
                pool, state = gdn_attention._conv_buffer_view(self), self.kv_cache[1]
                width = self.conv1d.weight.shape[-1]
                gdn_attention._spec_aware_nonspec(self, metadata, x, nothing, nothing, nothing, pool, state, width)
            else:
                gdn_attention._cpu_gdn_attention_nonspec(self, metadata, x, nothing, nothing, nothing)
        except self._Convolved as done:
            return done.args[0]
        raise AssertionError("vLLM's layer did not reach the delta rule")

    def verify(self, x: Tensor, slots: Tensor, starts: Tensor, accepted: Tensor) -> Tensor:
        """Convolve the last accepted token and the drafts of each sequence; ``slots`` [N, 1 + drafts]."""
        metadata = SimpleNamespace(
            num_spec_decodes=len(slots),
            spec_state_indices_tensor=slots,
            spec_query_start_loc=starts,
            num_accepted_tokens=accepted,
        )
        pool = gdn_attention._conv_buffer_view(self)
        sizes = (self.conv1d.weight.shape[-1], pool.shape[2])
        try:
            gdn_attention._spec_forward(self, metadata, x, x[:, :0], x[:, :0], pool, self.kv_cache[1], *sizes)
        except self._Convolved as done:
            return done.args[0]
        raise AssertionError("vLLM's layer did not reach the delta rule")


class _Convolutions(TorchDispatchMode):
    """Collects the operators that a call of vLLM's layer convolves with."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.name()
        if "conv" in name:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


class DeltaRule:
    """The delta rule over ``state`` [slots, HV, K, V], the transpose of ours."""

    key_first = True
    names: ClassVar = {
        "prefill": "chunk_gated_delta_rule_cpu",
        "decode": "fused_sigmoid_gating_delta_rule_update_cpu",
        "verify": "fused_sigmoid_gating_delta_rule_update_spec_cpu",
    }

    def __init__(self, heads: tuple[int, int, int]) -> None:
        key_heads, value_heads, dim = heads
        sizes = {"key_dim": key_heads * dim, "value_dim": value_heads * dim, "head_k_dim": dim, "head_v_dim": dim}
        self._layer = SimpleNamespace(**sizes, tp_size=1)

    def _split(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, channels] → q, k, v [1, T, heads, head_dim], copied apart as vLLM does."""
        return QwenGatedDeltaNetAttention.rearrange_mixed_qkv(self._layer, convolved)

    def prefill(
        self,
        convolved: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        slots: Tensor,
        starts: Tensor,
    ) -> Tensor:
        """The chunked form, from zero states."""
        q, k, v = self._split(convolved)
        g, beta = ops.fused_gdn_gating_cpu(A_log, a, b, dt_bias)
        state[slots] = 0
        return ops.chunk_gated_delta_rule_cpu(q, k, v, g, beta, state, True, starts, False, True, slots)[0].squeeze(0)

    def decode(
        self,
        convolved: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        slots: Tensor,
        starts: Tensor,
    ) -> Tensor:
        """One token a sequence."""
        q, k, v = self._split(convolved)
        return ops.fused_sigmoid_gating_delta_rule_update_cpu(
            A_log, dt_bias, q, k, v, a, b, state, slots, starts, True
        ).squeeze(1)

    def verify(
        self,
        convolved: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        slots: Tensor,
        starts: Tensor,
        accepted: Tensor,
    ) -> Tensor:
        """A few tokens a sequence; the state behind token t goes to ``slots[:, t]``."""
        q, k, v = (x.squeeze(0) for x in self._split(convolved))
        return ops.fused_sigmoid_gating_delta_rule_update_spec_cpu(
            A_log, dt_bias, q, k, v, a, b, state, slots, accepted, starts, True
        )


class CpuPeers(InductorPeers):
    """vLLM on this CPU."""

    def experts(self, w13: Tensor, w2: Tensor) -> tuple[str, Callable[..., None]]:
        return experts(w13, w2)

    def attention(self, key: Tensor, value: Tensor, queries: int, heads: int) -> PagedAttention:
        return PagedAttention(key, value, queries, heads)

    def linear(self, weight: Tensor) -> tuple[str, Callable[[Tensor], Tensor]]:
        return linear(weight)

    def convolution(self, weight: Tensor, pool: Tensor, heads: tuple[int, int, int]) -> DeltaNetLayer:
        return DeltaNetLayer(weight, pool, heads)

    def delta_rule(self, heads: tuple[int, int, int]) -> DeltaRule:
        return DeltaRule(heads)

    def topk_softmax(self, top_k: int) -> tuple[str, Callable[..., Any]]:
        return inductor("CPURouter", lambda logits: _softmax_topk(logits, top_k, True))
