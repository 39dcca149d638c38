"""The shared model on a plain engine against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import Qwen3NextForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextDecoderLayer,
    Qwen3NextRMSNorm,
    Qwen3NextRotaryEmbedding,
)

from qnext_plugins.model import (
    CoreWeights,
    MultiTokenPredictor,
    Qwen3NextConfig,
    RecurrentBatch,
    Segment,
    StatePools,
    VerifySegment,
)
from qnext_plugins.model.gated_delta_net import GatedDeltaNetCore, gated_delta_net_core
from tests.model.plain_engine import PlainEngine, PlainModel, stacked
from tests.model.transformers_models import (
    GROUP_OF_THREE,
    GROUP_OF_TWO,
    assert_as_close_as_rounding,
    randomize,
    rotary_table,
    small_config,
    small_model,
)

VARIANTS = [pytest.param(GROUP_OF_TWO, id="groups of two"), pytest.param(GROUP_OF_THREE, id="groups of three, biases")]
LENGTHS = (1, 63, 64, 65, 130)


def plain_copy(model: Qwen3NextForCausalLM, *, gives_weights: bool = False) -> PlainModel:
    config = Qwen3NextConfig.from_hf(model.config)
    plain = PlainModel(config, rotary_table(model.config), gives_weights=gives_weights)
    plain.load_state_dict(stacked(model.state_dict()))
    return plain


def assert_logits(actual: Tensor, model: Qwen3NextForCausalLM, tokens: Tensor) -> None:
    assert_as_close_as_rounding(actual, model, lambda referee: referee(tokens[None], use_cache=False).logits[0])


@pytest.mark.parametrize("gives_weights", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: dict[str, Any], gives_weights: bool) -> None:
    model = small_model(small_config(**variant))
    for length in LENGTHS:
        tokens = torch.randint(model.config.vocab_size, (length,))
        assert_logits(plain_copy(model, gives_weights=gives_weights)(tokens), model, tokens)


@pytest.mark.parametrize("gives_weights", [False, True])
def test_logits_with_every_second_layer_dense_are_those_of_transformers(gives_weights: bool) -> None:
    config = small_config(decoder_sparse_step=2, mlp_only_layers=[])
    model, tokens = small_model(config), torch.arange(20)
    assert {type(layer.mlp).__name__ for layer in model.model.layers} == {"Qwen3NextMLP", "Qwen3NextSparseMoeBlock"}
    assert_logits(plain_copy(model, gives_weights=gives_weights)(tokens), model, tokens)


@pytest.mark.parametrize("prompt", [1, 3, 60, 64, 65])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_and_decode_step_by_step_equal_the_full_forward(variant: dict[str, Any], prompt: int) -> None:
    model = small_model(small_config(**variant))
    tokens = torch.randint(model.config.vocab_size, (prompt + 8,))
    plain = plain_copy(model)
    pieces = [plain(tokens[:prompt]), *(plain(token[None]) for token in tokens[prompt:])]
    assert_logits(torch.cat(pieces), model, tokens)


@pytest.mark.parametrize("cuts", [(64,), (5,), (1, 2, 100)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_in_pieces_equals_the_full_forward(variant: dict[str, Any], cuts: tuple[int, ...]) -> None:
    model = small_model(small_config(**variant))
    tokens = torch.randint(model.config.vocab_size, (130,))
    plain = plain_copy(model)
    pieces = [plain(piece) for piece in tokens.tensor_split(cuts)]
    assert_logits(torch.cat(pieces), model, tokens)


class Draft(nn.Module):
    """Transformers has no draft model: its parts, put together as the checkpoint's tensors are named."""

    def __init__(self, config: transformers.Qwen3NextConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.pre_fc_norm_embedding = Qwen3NextRMSNorm(hidden, eps)
        self.pre_fc_norm_hidden = Qwen3NextRMSNorm(hidden, eps)
        attention = config.layer_types.index("full_attention")
        self.layers = nn.ModuleList([Qwen3NextDecoderLayer(config, attention)])
        self.norm = Qwen3NextRMSNorm(hidden, eps)
        self.rotary = Qwen3NextRotaryEmbedding(config)

    def forward(self, embeddings: Tensor, hidden_states: Tensor, positions: Tensor) -> Tensor:
        parts = [self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden_states)]
        joined = self.fc(torch.cat(parts, dim=-1))[None]
        rotary = self.rotary(joined, positions[None])
        mask = torch.full((1, 1, len(positions), len(positions)), float("-inf")).triu(1)
        return self.norm(self.layers[0](joined, position_embeddings=rotary, attention_mask=mask))[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_draft_is_its_composition_from_transformers(variant: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = small_config(**variant)
    config._attn_implementation = "eager"
    theirs = Draft(config)
    randomize(theirs)
    ours = MultiTokenPredictor(Qwen3NextConfig.from_hf(config), PlainEngine(rotary_table(config)), prefix="mtp")
    ours.load_state_dict(stacked(theirs.state_dict()))
    embeddings, hidden_states = torch.randn(2, 65, config.hidden_size)
    inputs = (embeddings, hidden_states, torch.arange(7, 72))
    with torch.no_grad():
        assert_as_close_as_rounding(ours.draft(*inputs), theirs, lambda referee: referee(*inputs))


def test_draft_steps_take_the_layers_in_turn() -> None:
    torch.manual_seed(0)
    config = small_config()
    config.num_nextn_predict_layers = 2
    draft = MultiTokenPredictor(Qwen3NextConfig.from_hf(config), PlainEngine(rotary_table(config)), prefix="mtp")
    randomize(draft)
    taken: list[int] = []
    for n, layer in enumerate(draft.layers):
        layer.register_forward_hook(lambda *_, n=n: taken.append(n))
    with torch.no_grad():
        for step in range(4):
            embeddings, hidden_states = torch.randn(2, 1, config.hidden_size)
            draft.draft(embeddings, hidden_states, torch.tensor([step]), step)
    assert taken == [0, 1, 0, 1]


def test_core_gives_each_segment_of_a_mixed_batch_what_it_gets_alone() -> None:
    torch.manual_seed(0)
    heads, value_dim, key_dim, width, drafts = 4, 6, 8, 4, 2
    channels = 2 * 2 * key_dim + heads * value_dim
    tokens = 14
    inputs = (torch.randn(tokens, channels + heads * value_dim), torch.randn(tokens, 2 * heads))
    weights = CoreWeights(torch.randn(channels, width), torch.randn(heads), torch.randn(heads), torch.randn(value_dim))
    conv_state, state = torch.randn(12, channels, width - 1 + drafts), torch.randn(12, heads, value_dim, key_dim)
    columns = torch.tensor([[0, 1, 2], [3, 4, 5]])
    verify = VerifySegment(torch.tensor([0, 1, 2, 11, 12]), columns, torch.tensor([0, 3, 5]), torch.tensor([2, 1]))
    decode = Segment(torch.tensor([4, 9]), torch.tensor([6, -1]))
    prefill = Segment(slice(5, 9), torch.tensor([7, 8]), torch.tensor([0, 1, 4]), torch.tensor([True, False]))

    def run(batch: RecurrentBatch) -> tuple[Tensor, Tensor, Tensor]:
        pools = (conv_state.clone(), state.clone())
        return gated_delta_net_core(*inputs, weights, 1e-6, StatePools(*pools), batch), *pools

    mixed = run(RecurrentBatch(decode=decode, prefill=prefill, verify=verify))
    alone = [RecurrentBatch(decode=decode), RecurrentBatch(prefill=prefill), RecurrentBatch(verify=verify)]
    for batch, rows, slots in zip(
        map(run, alone), ([4, 9], [5, 6, 7, 8], [0, 1, 2, 11, 12]), ([6], [7, 8], [0, 1, 2, 3, 4, 5]), strict=True
    ):
        assert torch.equal(mixed[0][rows], batch[0][rows])
        assert torch.equal(mixed[1][slots], batch[1][slots])
        assert torch.equal(mixed[2][slots], batch[2][slots])
    assert not mixed[0][[3, 9, 10, 13]].any()
    out, pools = torch.full_like(mixed[0], math.nan), StatePools(conv_state.clone(), state.clone())
    batch = RecurrentBatch(decode=decode, prefill=prefill, verify=verify)
    assert gated_delta_net_core(*inputs, weights, 1e-6, pools, batch, out) is out
    assert torch.equal(out, mixed[0])
    for pool, before in zip(mixed[1:], (conv_state, state), strict=True):
        assert torch.equal(pool[9:], before[9:])


def test_core_that_is_called_again_notices_other_weights_pools_and_widths() -> None:
    torch.manual_seed(0)
    core, width, columns = GatedDeltaNetCore(1e-6), 4, torch.tensor([[0, 1], [3, 2]])

    def layer(heads: int, dim: int) -> tuple[CoreWeights, StatePools]:
        channels = 4 * dim + heads * dim
        weights = (torch.randn(channels, width), torch.randn(heads), torch.randn(heads), torch.randn(dim))
        return CoreWeights(*weights), StatePools(torch.randn(4, channels, width), torch.randn(4, heads, dim, dim))

    first, second = layer(4, 8), layer(4, 8)
    for weights, pools in (first, first, (second[0], first[1]), second, layer(4, 16), layer(2, 8)):
        _, heads, dim, _ = pools.recurrent.shape
        for verify in (False, True):
            tokens = 3 if verify else 2
            inputs = (torch.randn(tokens, 4 * dim + 2 * heads * dim), torch.randn(tokens, 2 * heads))
            batch = RecurrentBatch(decode=Segment(slice(0, 2), columns[:, 0]))
            if verify:
                where = torch.tensor([0, 2, 3]), torch.tensor([1, 2])
                batch = RecurrentBatch(verify=VerifySegment(slice(None), columns, *where))
            copies = StatePools(pools.conv.clone(), pools.recurrent.clone())
            expected = gated_delta_net_core(*inputs, weights, 1e-6, copies, batch)
            assert torch.equal(core(*inputs, weights, pools, batch), expected)
            assert torch.equal(pools.conv, copies.conv)
            assert torch.equal(pools.recurrent, copies.recurrent)


def test_core_that_is_called_again_names_bad_indices() -> None:
    heads, dim, width = 2, 8, 4
    channels = 4 * dim + heads * dim
    weights = CoreWeights(torch.randn(channels, width), torch.randn(heads), torch.randn(heads), torch.randn(dim))
    pools = StatePools(torch.zeros(4, channels, width), torch.zeros(4, heads, dim, dim))
    inputs, core = (torch.randn(2, channels + heads * dim), torch.randn(2, 2 * heads)), GatedDeltaNetCore(1e-6)
    with pytest.raises(IndexError, match=r"^slots: expected indices within"):
        core(*inputs, weights, pools, RecurrentBatch(decode=Segment(slice(0, 2), torch.tensor([0, 4]))))
    columns, starts = torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1, 2])
    verify = VerifySegment(slice(0, 2), columns, starts, torch.tensor([1, 3]))
    with pytest.raises(IndexError, match=r"^num_accepted_tokens: expected indices within"):
        core(*inputs, weights, pools, RecurrentBatch(verify=verify))
    assert not pools.recurrent.any()
