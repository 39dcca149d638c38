"""SGLang's graphs of prefill hold the decoder alone: they call its ``forward`` to capture it, and replace it to replay.

The graphs need a GPU; which function they take, what they hand to it and what the rest of the model makes of its result
do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.configs.qwen3_next import Qwen3NextConfig
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.runner import prefill_cuda_graph_runner as graphs
from sglang.srt.runtime_context import get_context, get_parallel
from sglang.srt.server_args import ServerArgs
from torch import Tensor

from qnext_sglang.models import qwen3_next, qwen3_next_mtp
from qnext_sglang.models.qwen3_next import ServedModel
from tests.checkpoints import random_config
from tests.sglang import recurrent_runs as runs

SIZES = {"num_hidden_layers": 4, "num_experts": 4, "mlp_only_layers": [0, 1, 2, 3], "vocab_size": 64}
RANK = {"tp_group": None, "tp_rank": 0, "moe_ep_rank": 0, "moe_tp_rank": 0}
IDS = torch.tensor([3, 1, 4, 1, 5])


class Mixers:
    """In place of attention over a cache, of either kind: each token for itself."""

    def forward(self, q: Tensor | None = None, *kv_and_batch: Any, layer: Any = None, **inputs: Any) -> Tensor:
        if q is not None:
            return q
        heads, width = layer.num_v_heads, layer.head_v_dim
        return inputs["mixed_qkv"][None, :, : heads * width].unflatten(-1, (heads, width))


@pytest.fixture(params=[qwen3_next.EntryClass, qwen3_next_mtp.EntryClass], ids=["target", "draft"])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedModel]:
    """On one rank of a CPU, with random weights."""
    stored = random_config(**SIZES)
    stored.save_pretrained(tmp_path)
    config = Qwen3NextConfig(**stored.to_dict() | {"full_attention_interval": 4})
    server_args = ServerArgs(model_path=str(tmp_path), device="cpu")
    monkeypatch.setattr(qwen3_next.api, "get_server_args", lambda: server_args)
    monkeypatch.setattr(qwen3_next, "checkpoint_folder", lambda: None)
    with get_context().override_server_args(_mamba_cache_chunk_size=64), get_parallel().override(**RANK):
        torch.manual_seed(0)
        made = request.param(config)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter.data, std=0.3)
        yield made


@pytest.fixture
def batch() -> ForwardBatch:
    """A prefill of one request; a draft finds the target's hidden states in it."""
    made = runs.prefill_batch([2], [len(IDS)], [0])
    made.input_ids, made.positions = IDS, torch.arange(len(IDS))
    made.capture_hidden_mode = CaptureHiddenMode.NULL
    made.spec_info = SimpleNamespace(
        hidden_states=torch.randn(len(IDS), 64, generator=torch.Generator().manual_seed(1))
    )
    return made


def test_what_a_graph_captures_is_all_between_token_ids_and_head(model: ServedModel, batch: ForwardBatch) -> None:
    body = graphs._resolve_transformer_layer_model(model)
    arguments = batch.input_ids, batch.positions, batch
    with forward_context(ForwardContext(attn_backend=Mixers())):
        captured = body.forward(*arguments, **graphs._build_layer_model_forward_kwargs(body, batch, None))
        logits = model.forward(*arguments).next_token_logits
        torch.testing.assert_close(logits, captured[-1:] @ model.lm_head.weight.T)
        # A replay: nothing of the decoder runs outside.
        body.forward = lambda *arguments, **options: 2 * captured
        assert torch.equal(model.forward(*arguments).next_token_logits, 2 * logits)
