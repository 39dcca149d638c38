"""All decoder layers of a step without prefills in one call of C++ (``csrc/decoder_stack.cpp``).

A layer's weights, pools and caches are checked and packed once, on which calls from Python spend their time. The layers
are those of the calls that the model makes otherwise, so the bits are theirs.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from qnext_kernels.checks import INTEGERS, expect_dtype, expect_indices, expect_query_start_loc, expect_shape
from qnext_kernels.decoder_layer import ExpertsWeights, LinearWeight, native
from qnext_kernels.gated_delta_net import prepare_layer
from qnext_kernels.gated_delta_net.native import GATED_DELTA_NET
from qnext_kernels.gated_delta_net.prepared import PreparedLayer
from qnext_kernels.integers import columns_of
from qnext_kernels.linear.native import linear_fields
from qnext_kernels.moe.native import contiguous_gate, experts_fields
from qnext_kernels.native import DTYPES
from qnext_kernels.paged_attention.checks import check_values
from qnext_kernels.paged_attention.native import PAGED_ATTENTION, STORE_KV
from qnext_kernels.paged_attention.native import reads as reads_caches
from qnext_kernels.rows import floats, indices, packed_function, rows


class DeltaNetMixer(NamedTuple):
    """Of a Gated DeltaNet layer all but its output projection."""

    qkvz: LinearWeight
    ba: LinearWeight
    weights: tuple[Tensor, Tensor, Tensor, Tensor]
    """conv_weight, A_log, dt_bias and norm_weight of :func:`qnext_kernels.gated_delta_net_decode`."""
    conv_state: Tensor
    state: Tensor


class AttentionMixer(NamedTuple):
    """Of a gated attention layer all but its output projection."""

    qkv: LinearWeight
    q_weight: Tensor
    k_weight: Tensor
    cos_sin: Tensor
    num_heads: int
    num_kv_heads: int
    key_cache: Tensor
    value_cache: Tensor
    scale: float


class StackedLayer(NamedTuple):
    """A decoder layer: the arguments of the calls in :mod:`qnext_kernels.decoder_layer` that stay."""

    input_norm: Tensor
    mixer: DeltaNetMixer | AttentionMixer
    group: int
    """Its place among the steps of its kind of mixer."""
    out_proj: LinearWeight
    norm: Tensor
    router: LinearWeight
    moe: ExpertsWeights
    top_k: int
    renormalize: bool


class DeltaNetStep(NamedTuple):
    """What the sequences of a step have in the pools of a group of layers; a decode has only slots, a verify all."""

    slots: Tensor
    """[N, S] int32 or int64; −1 is skipped."""
    query_start_loc: Tensor | None = None
    num_accepted_tokens: Tensor | None = None


class AttentionStep(NamedTuple):
    """The same in the caches of a group, as :func:`qnext_kernels.paged_attention` and ``store_kv`` take it."""

    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor


class DecoderStack:
    """Layers that run as one call; what they were made of stays alive with it.

    Args:
        layers: in order, of one float dtype, all of what :func:`stackable` allows.
        eps: of all norms.
    """

    def __init__(self, layers: Sequence[StackedLayer], eps: float) -> None:
        self._layers, self._eps = list(layers), eps
        self._width, self._dtype = layers[0].norm.shape[0], _dtype(layers)
        self._kept: list[Tensor | None] = []
        packed = b"".join(map(self._pack, layers))
        self._memory = ctypes.create_string_buffer(packed, len(packed))
        self._groups = [
            1 + max((layer.group for layer in layers if isinstance(layer.mixer, kind)), default=-1)
            for kind in (DeltaNetMixer, AttentionMixer)
        ]
        self._windows = min(
            (
                layer.mixer.conv_state.shape[2] - layer.mixer.weights[0].shape[1] + 2
                for layer in layers
                if isinstance(layer.mixer, DeltaNetMixer)
            ),
            default=0,
        )

    def run(
        self,
        hidden_states: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        delta_nets: Sequence[DeltaNetStep],
        attentions: Sequence[AttentionStep],
    ) -> tuple[Tensor, Tensor]:
        """Map hidden states [T, D], residual [T, D] or None and positions [T] to the next two; all pools are written.

        Args:
            hidden_states, residual: in the dtype of the weights.
            positions: int32 or int64.
            delta_nets, attentions: of each group of its kind, for the same sequences, whose tokens are all T.

        Raises:
            ValueError, TypeError, IndexError: an argument does not fit; nothing has been written.
        """
        tokens = hidden_states.shape[0]
        expect_shape("hidden_states", hidden_states, (None, self._width))
        expect_dtype("hidden_states", hidden_states, (self._dtype,))
        if residual is not None:
            expect_shape("residual", residual, hidden_states.shape)
            expect_dtype("residual", residual, (self._dtype,))
        expect_shape("positions", positions, (tokens,))
        expect_dtype("positions", positions, INTEGERS)
        if [len(delta_nets), len(attentions)] != self._groups:
            raise ValueError(f"steps: expected {self._groups} groups, got {[len(delta_nets), len(attentions)]}")
        nets = b"".join(self._pack_net(step, tokens) for step in delta_nets)
        caches = b"".join(self._pack_caches(step, tokens) for step in attentions)
        hidden_states, positions = native.unit_rows(hidden_states), positions.contiguous()
        residual = None if residual is None else native.unit_rows(residual)
        out, total = (torch.empty(tokens, self._width, dtype=self._dtype) for _ in range(2))
        before, stride = (0, 0) if residual is None else (residual.data_ptr(), residual.stride(0))
        if not _kernel()(
            *(ctypes.addressof(self._memory), len(self._layers), _address(nets), _address(caches)),
            *(*indices(positions), hidden_states.data_ptr(), before, hidden_states.stride(0), stride),
            *(DTYPES[self._dtype], tokens, self._width, out.data_ptr(), total.data_ptr()),
        ):
            self._explain(positions, delta_nets, attentions)
        return out, total

    def _pack_net(self, step: DeltaNetStep, tokens: int) -> bytes:
        slots, offsets, accepted = step
        count, columns = slots.shape
        expect_shape("slots", slots, (tokens if offsets is None else None, None))
        for name, index in zip(step._fields, step, strict=True):
            if index is not None:
                expect_dtype(name, index, INTEGERS)
                if not index.is_contiguous():
                    raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(index.stride())}")
        if offsets is not None:
            expect_shape("query_start_loc", offsets, (count + 1,))
            expect_shape("num_accepted_tokens", accepted, (count,))  # type: ignore[arg-type]
        most = min(columns, self._windows)
        return _NET_STEP.pack(*indices(slots), columns, count, *indices(offsets), *indices(accepted), most)

    def _pack_caches(self, step: AttentionStep, tokens: int) -> bytes:
        slot_mapping, table, lengths, offsets = step
        count = lengths.shape[0]
        expect_shape("slot_mapping", slot_mapping, (tokens,))
        expect_shape("block_table", table, (count, None))
        expect_shape("query_start_loc", offsets, (count + 1,))
        for name, index in zip(step._fields, step, strict=True):
            expect_dtype(name, index, INTEGERS)
            if index.stride(-1) != 1:
                raise ValueError(f"{name}: expected unit stride along the last axis, got {list(index.stride())}")
        where = (*indices(slot_mapping), *indices(table), table.stride(0), table.shape[1], count)
        return _ATTENTION_STEP.pack(*where, *indices(lengths), *indices(offsets))

    def _explain(
        self, positions: Tensor, delta_nets: Sequence[DeltaNetStep], attentions: Sequence[AttentionStep]
    ) -> None:
        """Raise what is out of range."""
        for layer in self._layers:
            mixer = layer.mixer
            if isinstance(mixer, DeltaNetMixer):
                slots, starts, accepted = delta_nets[layer.group]
                expect_indices("slots", slots, -1, min(mixer.state.shape[0], mixer.conv_state.shape[0]))
                if starts is not None and accepted is not None:
                    expect_query_start_loc(starts, len(positions))
                    expect_indices("num_accepted_tokens", accepted, 1, min(slots.shape[1], self._windows) + 1)
                continue
            expect_indices("positions", positions, 0, mixer.cos_sin.shape[0])
            slot_mapping, table, lengths, offsets = attentions[layer.group]
            blocks, block_size = mixer.key_cache.shape[:2]
            expect_indices("slot_mapping", slot_mapping, -1, blocks * block_size)
            check_values(table, lengths, offsets, len(positions), blocks, block_size)
        raise IndexError("query_start_loc: expected fewer tokens a sequence than slots and convolution windows")

    def _pack(self, layer: StackedLayer) -> bytes:
        mixer, moe, dtype = layer.mixer, layer.moe, DTYPES[self._dtype]
        norm = native.norm_fields(native.NO_ROWS, native.NO_ROWS, layer.input_norm, 0, 0, self._eps)
        delta_net: tuple[float, ...] = (0,) * _fields(_DELTA_NET)
        attention: tuple[float, ...] = (0,) * _fields(_ATTENTION)
        if isinstance(mixer, DeltaNetMixer):
            linears = (*linear_fields(*mixer.qkvz, 0, dtype), *linear_fields(*mixer.ba, 0, dtype))
            delta_net = (*norm, *linears, *self._delta_net_fields(mixer))
        else:
            attention = (*norm, *linear_fields(*mixer.qkv, 0, dtype), *self._attention_fields(mixer))
        shared = contiguous_gate(moe.shared or ())
        self._kept += shared
        block = (
            *(0,) * _fields(native.GATE),
            *linear_fields(*layer.out_proj, 0, dtype),
            *native.norm_fields(native.NO_ROWS, native.NO_ROWS, layer.norm, 0, 0, self._eps),
            *linear_fields(*layer.router, 0, dtype),
            *native.choice_fields(0, moe.w13.shape[0], layer.top_k, layer.renormalize),
            *experts_fields(moe.w13, moe.w2, moe.scales or (), moe.packed, shared, layer.top_k, 0, dtype),
        )
        return _LAYER.pack(isinstance(mixer, AttentionMixer), layer.group, *delta_net, *attention, *block)

    def _delta_net_fields(self, mixer: DeltaNetMixer) -> tuple[float, ...]:
        prepared = _prepared(mixer, self._dtype, self._eps)
        assert prepared is not None
        self._kept += prepared.tensors
        return prepared.fields()

    def _attention_fields(self, mixer: AttentionMixer) -> tuple[float, ...]:
        dtype, head_dim = DTYPES[self._dtype], mixer.q_weight.shape[0]
        cos_sin, (table, table_dtype, _, table_row) = rows(mixer.cos_sin)
        weights = mixer.q_weight.contiguous(), mixer.k_weight.contiguous()
        self._kept += [cos_sin, *weights]
        q_token, k_token = mixer.num_heads * head_dim, mixer.num_kv_heads * head_dim
        blocks, block_size = mixer.key_cache.shape[:2]
        strides = (*mixer.key_cache.stride()[:3], *mixer.value_cache.stride()[:3])
        keys, values = mixer.key_cache.data_ptr(), mixer.value_cache.data_ptr()
        element = mixer.key_cache.element_size()
        return (
            *(0, dtype, mixer.qkv.weight.shape[0], 0, 0, *floats(weights[0]), *floats(weights[1])),
            *(table, table_dtype, table_row, 0, 0, 0, 0, 0, mixer.num_heads, mixer.num_kv_heads, head_dim),
            *(cos_sin.shape[1], cos_sin.shape[0], self._eps),
            *(0, 0, keys, values, element, k_token, head_dim, k_token, head_dim, *strides),
            *(0, 0, 0, mixer.num_kv_heads, head_dim, block_size, blocks),
            *(0, 0, keys, values, 0, dtype, q_token, head_dim, 0, 0, *strides, *(0,) * 8),
            *(mixer.num_heads, mixer.num_kv_heads, head_dim, block_size, True, 0, blocks, 0, mixer.scale),
        )


def stackable(layers: Sequence[StackedLayer], eps: float) -> bool:
    """Whether C++ serves all that these layers do, and reads their weights, pools and caches."""
    dtype = _dtype(layers)
    parts = ("rms_norm", "linear", "moe", "gated_attention", "paged_attention")
    if dtype not in DTYPES:
        return False
    return native.serves(torch.empty(0, dtype=dtype), *parts) and all(_fits(layer, dtype, eps) for layer in layers)


def _dtype(layers: Sequence[StackedLayer]) -> torch.dtype:
    """That of hidden states: other linears than the router may have scales."""
    return layers[0].router.weight.dtype


def _fits(layer: StackedLayer, dtype: torch.dtype, eps: float) -> bool:
    mixer, out_proj = layer.mixer, layer.out_proj
    x = torch.empty(0, out_proj.weight.shape[0], dtype=dtype)
    mixed = torch.empty(0, columns_of(out_proj.weight), dtype=dtype)
    block = (mixed, mixed, out_proj, x, layer.norm, layer.router, layer.moe, layer.top_k)
    if not native.reads_norm(x, None, layer.input_norm) or not native.reads_block(*block):
        return False
    width = x.shape[1]
    if isinstance(mixer, DeltaNetMixer):
        value_width = mixer.state.shape[1] * mixer.state.shape[2]
        linears = all(native.reads_linear(linear, width, dtype) for linear in (mixer.qkvz, mixer.ba))
        return linears and mixed.shape[1] == value_width and _prepared(mixer, dtype, eps) is not None
    heads = (mixer.q_weight, mixer.k_weight, mixer.cos_sin, mixer.num_heads, mixer.num_kv_heads)
    caches = (mixer.key_cache, mixer.value_cache)
    return (
        native.reads_linear(mixer.qkv, width, dtype)
        and native.reads_heads(0, mixer.qkv.weight.shape[0], torch.empty(0, dtype=torch.int64), *heads)
        and mixed.shape[1] == mixer.num_heads * mixer.q_weight.shape[0]
        and all(cache.dtype == dtype and cache.shape == caches[0].shape for cache in caches)
        and caches[0].shape[2:] == (mixer.num_kv_heads, mixer.q_weight.shape[0])
        and reads_caches(*caches)
    )


def _prepared(mixer: DeltaNetMixer, dtype: torch.dtype, eps: float) -> PreparedLayer | None:
    qkvz, ba = (torch.empty(0, linear.weight.shape[0], dtype=dtype) for linear in (mixer.qkvz, mixer.ba))
    return prepare_layer(qkvz, ba, mixer.weights, eps, mixer.conv_state, mixer.state)


def _fields(layout: str) -> int:
    return struct.calcsize(layout) // 8


def _address(memory: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(memory), ctypes.c_void_p).value or 0


_DELTA_NET = native.NORM + native.LINEAR + native.LINEAR + GATED_DELTA_NET
_ATTENTION = native.NORM + native.LINEAR + native.HEADS + STORE_KV + PAGED_ATTENTION
_LAYER = struct.Struct("2q" + _DELTA_NET + _ATTENTION + native.BLOCK)
_NET_STEP, _ATTENTION_STEP = struct.Struct("9q"), struct.Struct("11q")
_kernel = cache(lambda: packed_function("qnext_decoder_stack", "15q"))
