"""All layers of a step in one call, against the calls that the model makes otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext_kernels import (
    ExpertsWeights,
    force_backend,
    gated_delta_net_decode,
    gated_delta_net_verify,
    linear_norm_experts,
    norm_heads,
    norm_linears,
    paged_attention,
    store_kv,
)
from qnext_kernels.decoder_layer.stack import (
    AttentionMixer,
    AttentionStep,
    DecoderStack,
    DeltaNetMixer,
    DeltaNetStep,
    StackedLayer,
    stackable,
)
from qnext_kernels.integers import INT4, INT8, quantize_int8
from tests.kernels.fp8_inputs import linear_in_fp8
from tests.kernels.integer_inputs import QUANTIZE, experts_in_int4, linear_in_integers
from tests.kernels.kernel_inputs import DTYPES, Bad, same_bits
from tests.kernels.test_decoder_layer import (
    EPS,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    POSITIONS,
    QKV,
    ROTARY,
    STORED,
    TOP_K,
    of_experts,
    packed,
    projection,
    stored_as,
)

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, WIDTH = 2, 4, 16, 16, 4
CHANNELS = 2 * KEY_HEADS * KEY_DIM + VALUE_HEADS * VALUE_DIM
BLOCKS, BLOCK_SIZE, SLOTS, DRAFTS = 8, 4, 12, 2
KINDS = (False, False, True, False)  # attention?


def delta_net(dtype: torch.dtype, state_dtype: torch.dtype = torch.float32) -> DeltaNetMixer:
    width = 2 * KEY_HEADS * KEY_DIM + 2 * VALUE_HEADS * VALUE_DIM
    weights = (torch.randn(CHANNELS, WIDTH).to(dtype), torch.rand(VALUE_HEADS), torch.randn(VALUE_HEADS))
    return DeltaNetMixer(
        projection(width, HIDDEN, dtype),
        projection(2 * VALUE_HEADS, HIDDEN, dtype),
        (*weights, torch.randn(VALUE_DIM).to(dtype)),
        torch.randn(SLOTS, WIDTH - 1 + DRAFTS, CHANNELS).to(dtype).transpose(1, 2),
        torch.randn(SLOTS, VALUE_HEADS, VALUE_DIM, KEY_DIM).to(state_dtype),
    )


def attention(dtype: torch.dtype) -> AttentionMixer:
    both = torch.randn(BLOCKS, KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM).to(dtype).transpose(1, 3)
    norms = (torch.randn(HEAD_DIM).to(dtype) * 0.1 for _ in range(2))
    tables = (*norms, torch.randn(POSITIONS, ROTARY), HEADS, KV_HEADS)
    return AttentionMixer(projection(QKV, HIDDEN, dtype, bias=True), *tables, both[:, :, 0], both[:, :, 1], 0.25)


def layers_of(dtype: torch.dtype, kinds: Sequence[bool] = KINDS, stored: str = "plain") -> list[StackedLayer]:
    layers = []
    for n, attends in enumerate(kinds):
        given = packed(stored_as(stored, of_experts(0, dtype, residual=n != 1)))
        parts = [given[name] for name in ("out_proj", "norm_weight", "router", "moe", "top_k", "renormalize")]
        # Layers of one kind lie in two groups.
        mixer, group = (attention(dtype), 0) if attends else (delta_net(dtype), int(n > 1))
        mixer = mixer._replace(**{mixer._fields[0]: STORED[stored][0](mixer[0])})
        layers.append(StackedLayer(torch.randn(HIDDEN) * 0.1, mixer, group, *parts))
    return layers


def pools_of(layers: Sequence[StackedLayer]) -> list[Tensor]:
    return [
        pool
        for mixer in (layer.mixer for layer in layers)
        for pool in (
            (mixer.key_cache, mixer.value_cache)
            if isinstance(mixer, AttentionMixer)
            else (mixer.conv_state, mixer.state)
        )
    ]


class Steps:
    """Sequences of 5 and 9 tokens in the cache, the last ``tokens`` of each new."""

    def __init__(self, tokens: int, *, verify: bool) -> None:
        lengths = torch.tensor([5, 9])
        offsets = torch.arange(3, dtype=torch.int32) * tokens
        table = torch.tensor([[2, 5, 0, 7], [3, 1, 6, 0]], dtype=torch.int32)
        places = [range(int(length) - tokens, int(length)) for length in lengths]
        slots = [int(table[n, i // BLOCK_SIZE]) * BLOCK_SIZE + i % BLOCK_SIZE for n in range(2) for i in places[n]]
        self.positions = torch.tensor([i for place in places for i in place])
        self.attentions = [AttentionStep(torch.tensor(slots), table, lengths, offsets)]
        columns = DRAFTS + 1 if verify else 1
        self.delta_nets = []
        for group in range(2):
            of = torch.arange(2 * columns).view(2, columns) + group
            where = (offsets, torch.tensor([2, 1], dtype=torch.int32)) if verify else ()
            self.delta_nets.append(DeltaNetStep(of.to(torch.int32), *where))


def one_by_one(layers: Sequence[StackedLayer], hidden: Tensor, residual: Tensor | None, steps: Steps) -> Any:
    for layer in layers:
        mixer, gate = layer.mixer, None
        norm = (hidden, residual, layer.input_norm, EPS)
        if isinstance(mixer, AttentionMixer):
            *heads, key_cache, value_cache, scale = mixer
            q, k, v, gate, residual = norm_heads(*norm, heads[0], steps.positions, *heads[1:])
            q, k, v = (x.unflatten(1, (-1, HEAD_DIM)) for x in (q, k, v))
            slot_mapping, *where = steps.attentions[layer.group]
            store_kv(k, v, key_cache, value_cache, slot_mapping)
            mixed = paged_attention(q, key_cache, value_cache, *where, scale).flatten(1)
        else:
            qkvz, ba, weights, *pools = mixer
            *projections, residual = norm_linears(*norm, qkvz, ba)
            by_head = (x.unflatten(1, (KEY_HEADS, -1)) for x in projections)
            slots, offsets, accepted = steps.delta_nets[layer.group]
            if offsets is None:
                mixed = gated_delta_net_decode(*by_head, *weights, EPS, *pools, slots[:, 0])
            else:
                mixed = gated_delta_net_verify(*by_head, *weights, EPS, *pools, slots, offsets, accepted)
        hidden, residual = linear_norm_experts(mixed, gate, layer.out_proj, residual, layer.norm, EPS, *layer[5:])
    return hidden, residual


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kinds", [KINDS, (True,), (False, False, False)])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("tokens", "verify"), [(1, False), (1, True), (3, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_call_has_the_bits_of_its_layers(
    dtype: torch.dtype, tokens: int, verify: bool, residual: bool, kinds: tuple[bool, ...], stored: str
) -> None:
    layers, steps = layers_of(dtype, kinds, stored), Steps(tokens, verify=verify)
    hidden = torch.randn(2 * tokens, HIDDEN + 8).to(dtype)[:, :HIDDEN]
    before = torch.randn(2 * tokens, HIDDEN).to(dtype) if residual else None
    untouched = hidden.clone(), None if before is None else before.clone()
    saved = [pool.clone() for pool in pools_of(layers)]
    theirs = one_by_one(layers, hidden, before, steps)
    written = [pool.clone() for pool in pools_of(layers)]
    for pool, old in zip(pools_of(layers), saved, strict=True):
        pool.copy_(old)
    assert stackable(layers, EPS)
    attentions = steps.attentions if True in kinds else []
    delta_nets = steps.delta_nets[: 2 if kinds == KINDS or len(kinds) == 3 else 0]
    ours = DecoderStack(layers, EPS).run(hidden, before, steps.positions, delta_nets, attentions)
    for actual, want in zip((*ours, *pools_of(layers)), (*theirs, *written), strict=True):
        assert same_bits(actual, want)
    assert same_bits(hidden, untouched[0])
    assert before is None or same_bits(before, untouched[1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad",
    [
        Bad("positions", "behind the table", lambda x: x + POSITIONS, IndexError),
        Bad("slots", "behind the pool", lambda x: x + SLOTS, IndexError),
        Bad("slots", "of fewer sequences", lambda x: x[:1], ValueError),
        Bad("slot_mapping", "behind the cache", lambda x: x + BLOCKS * BLOCK_SIZE, IndexError),
        Bad("seq_lens", "longer than the table", lambda x: x + 9, ValueError),
        Bad("block_table", "behind the cache", lambda x: x + BLOCKS, IndexError),
        Bad("block_table", "of floats", torch.Tensor.float, TypeError),
        Bad("hidden_states", "too wide", lambda x: torch.zeros(2, HIDDEN + 1), ValueError),
        Bad("residual", "another dtype", lambda x: torch.zeros(2, HIDDEN).double(), TypeError),
    ],
    ids=str,
)
def test_bad_arguments_are_named_before_anything_is_written(bad: Bad) -> None:
    layers, steps = layers_of(torch.float32), Steps(1, verify=False)
    saved = [pool.clone() for pool in pools_of(layers)]
    net, caches = steps.delta_nets[1], steps.attentions[0]
    given: dict[str, Any] = {"hidden_states": torch.randn(2, HIDDEN), "residual": None, "positions": steps.positions}
    for arguments in (given, net._asdict(), caches._asdict()):
        if bad.argument in arguments:
            change = {bad.argument: bad.change(arguments[bad.argument])}
    given |= {name: value for name, value in change.items() if name in given}
    net = net._replace(**change) if bad.argument in net._fields else net
    caches = caches._replace(**change) if bad.argument in caches._fields else caches
    with pytest.raises(bad.error, match=f"^{bad.argument}:"):
        DecoderStack(layers, EPS).run(**given, delta_nets=[steps.delta_nets[0], net], attentions=[caches])
    assert all(map(same_bits, pools_of(layers), saved))


def with_a_shared_expert_in_other_groups(moe: ExpertsWeights) -> ExpertsWeights:
    w13, w13_scale, w2, w2_scale, gate = moe.shared
    return moe._replace(shared=(w13, w13_scale, w2, w2_scale[:, ::2].contiguous(), gate))


def test_layers_that_the_kernel_does_not_read_are_not_stacked() -> None:
    layers = layers_of(torch.float32)
    assert stackable(layers, EPS)
    with force_backend("native,moe=cpu"):
        assert not stackable(layers, EPS)
    out_proj, moe = layers[0].out_proj, layers[0].moe
    shared_int4, shared_int8 = (experts_in_int4(moe, stored).shared for stored in (INT4, INT8))
    routed = quantize_int8(moe.w13, 32), quantize_int8(moe.w2, 32)
    in_bfloat16 = torch.ones(HIDDEN, 2, dtype=torch.bfloat16)
    strided = torch.zeros(BLOCKS, BLOCK_SIZE, KV_HEADS, 2 * HEAD_DIM)[..., ::2]
    for change in (
        {"norm": layers[0].norm.double()},
        {"mixer": delta_net(torch.float32, torch.float16)},
        {"mixer": attention(torch.float32)._replace(key_cache=strided)},
        {"out_proj": projection(HIDDEN, 8, torch.float32)},
        {"out_proj": linear_in_fp8(out_proj)._replace(scale=None)},
        *({"out_proj": linear_in_integers(out_proj, stored)._replace(scale=None)} for stored in QUANTIZE),
        *({"out_proj": linear_in_integers(out_proj, stored)._replace(scale=in_bfloat16)} for stored in QUANTIZE),
        *({"moe": with_a_shared_expert_in_other_groups(experts_in_int4(moe, stored))} for stored in QUANTIZE),
        {"moe": experts_in_int4(moe)._replace(shared=(*shared_int4[:2], *shared_int8[2:]))},
        {"moe": ExpertsWeights(routed[0][0], routed[1][0], False, None, (routed[0][1], routed[1][1]))},
        {"moe": moe._replace(scales=(torch.ones(EXPERTS, 2, 1), torch.ones(EXPERTS, 1, 1)))},
        {"router": projection(EXPERTS + 1, HIDDEN, torch.float32)},
        {"top_k": EXPERTS + TOP_K},
    ):
        assert not stackable([layers[0]._replace(**change), *layers[1:]], EPS)
