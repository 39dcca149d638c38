"""Gated DeltaNet backends over SGLang's own pools on a CPU, and the batches that they get, without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateDType, Mamba2StateShape
from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from torch import Tensor

from qnext_plugins.model import CoreWeights
from qnext_plugins.model.gated_delta_net import GatedDeltaNetCore
from qnext_sglang.cpu.attention import CpuAttentionBackend
from qnext_sglang.cpu.gated_delta_net import CpuGatedDeltaNetBackend, CpuHybridBackend

KEY_HEADS, VALUE_HEADS, HEAD_DIM, KERNEL_SIZE = 2, 4, 8, 4
CHANNELS = (2 * KEY_HEADS + VALUE_HEADS) * HEAD_DIM
LINEAR_LAYERS, FULL_LAYERS = [0, 2], [1, 3]
REQUESTS, STATES, DRAFT_TOKENS = 6, 24, 3
SLOTS = torch.tensor([0, 7, 3, 12, 5, 9, 20], dtype=torch.int32)
"""The slot of each request; request 0 is SGLang's padding."""


@dataclass
class Inputs:
    """What the layer's projections give for T tokens."""

    qkvz: Tensor
    ba: Tensor

    def __getitem__(self, tokens: slice | Tensor) -> Inputs:
        return Inputs(self.qkvz[tokens], self.ba[tokens])


def inputs(tokens: int, seed: int) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    widths = CHANNELS + VALUE_HEADS * HEAD_DIM, 2 * VALUE_HEADS
    return Inputs(*(torch.randn(tokens, width, generator=random) for width in widths))


def layer(layer_id: int = 2) -> SimpleNamespace:
    """What a ``RadixLinearAttention`` of ours carries to the backend."""
    random = torch.Generator().manual_seed(100 + layer_id)
    return SimpleNamespace(
        layer_id=layer_id,
        num_v_heads=VALUE_HEADS,
        head_v_dim=HEAD_DIM,
        qnext_core=GatedDeltaNetCore(1e-6),
        qnext_weights=CoreWeights(
            torch.randn(CHANNELS, KERNEL_SIZE, generator=random),
            torch.rand(VALUE_HEADS, generator=random),
            torch.randn(VALUE_HEADS, generator=random),
            torch.rand(HEAD_DIM, generator=random),
        ),
    )


def runner() -> SimpleNamespace:
    """SGLang's ModelRunner as far as a backend reads it, with random states in its pool."""
    shape = Mamba2StateShape.create(
        tp_world_size=1,
        intermediate_size=VALUE_HEADS * HEAD_DIM,
        n_groups=KEY_HEADS,
        num_heads=VALUE_HEADS,
        head_dim=HEAD_DIM,
        state_size=HEAD_DIM,
        conv_kernel=KERNEL_SIZE,
    )
    dtype = Mamba2StateDType(conv=torch.float32, temporal=torch.float32)
    pool = HybridReqToTokenPool(
        size=REQUESTS,
        mamba_size=STATES,
        mamba_spec_state_size=REQUESTS,
        max_context_len=64,
        device="cpu",
        enable_memory_saver=False,
        cache_params=Mamba2CacheParams(shape=shape, dtype=dtype, layers=LINEAR_LAYERS),
        mamba_layer_ids=LINEAR_LAYERS,
        enable_mamba_extra_buffer=True,
        speculative_num_draft_tokens=DRAFT_TOKENS,
        speculative_eagle_topk=1,
    )
    pool.req_index_to_mamba_index_mapping.copy_(SLOTS)
    random = torch.Generator().manual_seed(1)
    for states in (pool.mamba_pool.mamba_cache.conv[0], pool.mamba_pool.mamba_cache.temporal):
        states.copy_(torch.randn(states.shape, generator=random))
    return SimpleNamespace(
        server_args=SimpleNamespace(enable_mis=False),
        device="cpu",
        is_draft_worker=False,
        req_to_token_pool=pool,
        token_to_kv_pool=None,
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace()),
    )


def backend() -> CpuGatedDeltaNetBackend:
    return CpuGatedDeltaNetBackend(runner())


def hybrid(linear: CpuGatedDeltaNetBackend) -> CpuHybridBackend:
    return CpuHybridBackend(CpuAttentionBackend(linear._model_runner), linear, FULL_LAYERS)


def states(of: CpuGatedDeltaNetBackend, layer_id: int = 2) -> tuple[Tensor, Tensor]:
    """Copies of a layer's pools."""
    cache = of.req_to_token_pool.mamba2_layer_cache(layer_id)
    return cache.conv[0].clone(), cache.temporal.clone()


def step_states(of: CpuGatedDeltaNetBackend, layer_id: int = 2) -> tuple[Tensor, Tensor]:
    """Copies of a layer's step pools."""
    cache = of.req_to_token_pool.mamba2_layer_cache(layer_id)
    return cache.intermediate_conv_window[0].clone(), cache.intermediate_ssm.clone()


def forward_batch(mode: ForwardMode, requests: Sequence[int], tokens: int, **fields: Any) -> ForwardBatch:
    return ForwardBatch(
        forward_mode=mode,
        batch_size=len(requests),
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        req_pool_indices=torch.tensor(requests, dtype=torch.int64),
        seq_lens=torch.full((len(requests),), 50),
        seq_lens_cpu=torch.full((len(requests),), 50),
        seq_lens_sum=50 * len(requests),
        out_cache_loc=torch.zeros(tokens, dtype=torch.int64),
        **fields,
    )


def decode_batch(requests: Sequence[int], **fields: Any) -> ForwardBatch:
    return forward_batch(ForwardMode.DECODE, requests, len(requests), **fields)


def verify_batch(requests: Sequence[int], **fields: Any) -> ForwardBatch:
    drafts = SimpleNamespace(draft_token_num=DRAFT_TOKENS, ragged_verify_layout=None)
    return forward_batch(ForwardMode.TARGET_VERIFY, requests, len(requests) * DRAFT_TOKENS, spec_info=drafts, **fields)


@dataclass
class Tracked:
    """Which sequences of a prefill leave a snapshot, behind how many tokens of them in all, and in which slots."""

    mask: list[bool]
    lengths: list[int]
    slots: list[int]
    mirrored: bool = True
    """SGLang's scheduler hands the mask and the lengths on in Python lists too."""

    def fields(self) -> dict[str, Any]:
        lists = {"mamba_prefill_track_mask_cpu": self.mask, "mamba_track_seqlens_cpu": self.lengths}
        return {
            "mamba_track_mask": torch.tensor(self.mask),
            "mamba_track_seqlens": torch.tensor(self.lengths),
            "mamba_track_indices": torch.tensor(self.slots),
            **(lists if self.mirrored else {}),
        }


def prefill_batch(
    requests: Sequence[int], lengths: Sequence[int], prefixes: Sequence[int], tracked: Tracked | None = None
) -> ForwardBatch:
    ends = torch.tensor(lengths).cumsum(0)
    return forward_batch(
        ForwardMode.EXTEND,
        requests,
        sum(lengths),
        extend_seq_lens=torch.tensor(lengths, dtype=torch.int32),
        extend_prefix_lens=torch.tensor(prefixes, dtype=torch.int32),
        extend_start_loc=(ends - torch.tensor(lengths)).int(),
        extend_seq_lens_cpu=list(lengths),
        extend_prefix_lens_cpu=list(prefixes),
        **(tracked.fields() if tracked is not None else {}),
    )


def run(on: CpuGatedDeltaNetBackend, batch: ForwardBatch, x: Inputs, layer_id: int = 2) -> Tensor:
    """One layer over a batch as SGLang runs it: metadata, then the layer. [T, HV, V]."""
    on.init_forward_metadata(batch)
    return forward(on, batch, x, layer_id)


def forward(on: CpuGatedDeltaNetBackend, batch: ForwardBatch, x: Inputs, layer_id: int = 2) -> Tensor:
    decodes = batch.logical_forward_mode.is_decode()
    function = on.forward_decode if decodes else on.forward_extend
    # SGLang's hybrid backend hands all of these on, by name.
    unused = {"q": None, "k": None, "v": None, "save_kv_cache": True}
    out = function(layer=layer(layer_id), forward_batch=batch, mixed_qkv=x.qkvz, a=x.ba, b=x.ba, **unused)
    assert out.shape == (1, len(x.ba), VALUE_HEADS, HEAD_DIM)
    return out[0]
