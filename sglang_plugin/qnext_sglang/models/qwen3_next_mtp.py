"""Qwen3NextForCausalLMMTP for SGLang: the shared draft model, which shares embedding and head with the target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qnext_plugins.model import MultiTokenPredictor, Qwen3NextConfig, checked_weights, from_gptq
from qnext_plugins.model.weights import MTP_PREFIX
from qnext_plugins.packed_methods import unpacked_weights
from qnext_sglang import sglang_api as api
from qnext_sglang.engine import SglangEngine
from qnext_sglang.loading import load_parameters
from qnext_sglang.models.qwen3_next import ServedModel
from qnext_sglang.quantization import is_int4


class DraftModel(MultiTokenPredictor):
    """Embedding and the shared draft, with the ``forward`` that SGLang's graphs of prefill capture on its own."""

    def __init__(self, config: Qwen3NextConfig, engine: SglangEngine, embedding: nn.Module, *, prefix: str) -> None:
        super().__init__(config, engine, prefix=prefix)
        self.embed_tokens = embedding
        self._batch = engine.batch

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: api.ForwardBatch,
        input_embeds: Tensor | None = None,
    ) -> Tensor:
        hidden_states = forward_batch.spec_info.hidden_states
        if forward_batch.forward_mode.is_idle():
            return hidden_states
        embeddings = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        with self._batch.of(forward_batch):
            return self.draft(embeddings, hidden_states, positions)


class Qwen3NextForCausalLMMTP(ServedModel):
    """The class that SGLang's registry resolves the draft ``Qwen3NextForCausalLMMTP`` to."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config)
        self.model = DraftModel(
            self.qnext_config, self.engine, self.make_embedding(), prefix=api.add_prefix("mtp", prefix)
        )
        self.lm_head = self.make_head(prefix)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: api.ForwardBatch,
        input_embeds: Tensor | None = None,
        **_: Any,
    ) -> Any:
        hidden_states = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the draft's tensors, all of them the first time.

        Raises:
            CheckpointError: of a checkpoint whose tensors are known, the draft's are others, or not all there.
        """
        weights = ((name, tensor) for name, tensor in weights if self._is_ours(name))
        if is_int4(self.quant_config):
            weights = from_gptq(weights, self.quant_config.integers.bits)
        if (shapes := self.stored_shapes(target=False, mtp=True)) is not None:
            weights = checked_weights(weights, shapes, complete=not self.loads_parts)
        with unpacked_weights(self):
            loaded = load_parameters(self, self._renamed(weights), self.qnext_config.num_experts)
        self.loads_parts = True
        return loaded

    @staticmethod
    def _is_ours(name: str) -> bool:
        return name.startswith((MTP_PREFIX, "model.embed_tokens.", "lm_head."))

    @staticmethod
    def _renamed(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            yield f"model.{name.removeprefix(MTP_PREFIX)}" if name.startswith(MTP_PREFIX) else name, tensor


EntryClass = Qwen3NextForCausalLMMTP
