"""Qwen3NextForCausalLM for SGLang: the shared layers inside SGLang's embedding and head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qnext_plugins.model import (
    DecoderLayer,
    Qwen3NextConfig,
    check_files,
    checked_weights,
    expected_shapes,
    from_gptq,
)
from qnext_plugins.model.weights import MTP_PREFIX
from qnext_plugins.packed_methods import unpacked_weights
from qnext_sglang import determinism
from qnext_sglang import sglang_api as api
from qnext_sglang.engine import SglangEngine
from qnext_sglang.linear import on_our_kernel
from qnext_sglang.loading import load_parameters, read_config
from qnext_sglang.quantization import expect_served, is_int4, shapes_on_cpu
from qnext_sglang.serving import announce, checkpoint_folder, in_tree_class, loads_nothing, stacks_layers


class ServedModel(nn.Module):
    """What target and draft have in common: SGLang's embedding and head, and the way they come to be.

    Where this SGLang or its configuration is not served, the constructor gives SGLang's own model.
    """

    is_qnext = True
    model: Any
    """With ``embed_tokens``."""
    lm_head: Any
    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __new__(cls, config: Any = None, quant_config: Any = None, prefix: str = "", **options: Any) -> Any:
        if (in_tree := in_tree_class(cls.__name__)) is not None:
            return in_tree(config, quant_config, prefix, **options)
        return super().__new__(cls)

    def __init__(self, config: Any, quant_config: Any) -> None:
        super().__init__()
        expect_served(quant_config)
        if is_int4(quant_config):
            quant_config.read_names(config._name_or_path, api.get_server_args().revision)
        determinism.prepare(api.get_server_args(), config, quant_config)
        announce(type(self).__name__, torch.get_default_dtype())
        self.config, self.quant_config = config, quant_config
        self.qnext_config = read_config(config)
        self.qnext_config.check_tensor_parallel(api.get_parallel().tp_size)
        if hasattr(quant_config, "packed_modules_mapping"):
            quant_config.packed_modules_mapping = self.packed_modules_mapping
        self.engine = SglangEngine(config, quant_config)
        self.logits_processor = api.LogitsProcessor(config)
        self.loads_parts = loads_nothing()
        """Whether a load may bring some of the weights alone: once there are any, they are updated in parts."""

    def stored_shapes(self, **parts: bool) -> dict[str, tuple[int, ...]] | None:
        """:func:`expected_shapes` as the checkpoint stores them, where that is known: unquantized, or ours on a CPU."""
        shapes = expected_shapes(self.qnext_config, **parts)
        return shapes if self.quant_config is None else shapes_on_cpu(self.quant_config, shapes)

    def make_embedding(self) -> nn.Module:
        return api.VocabParallelEmbedding(
            self.config.vocab_size, self.config.hidden_size, org_num_embeddings=self.config.vocab_size
        )

    def make_head(self, prefix: str) -> nn.Module:
        """The head, which is the embedding where the checkpoint ties them."""
        if self.qnext_config.tie_word_embeddings:
            return on_our_kernel(self.model.embed_tokens, packable=False)
        return on_our_kernel(
            api.ParallelLMHead(
                self.config.vocab_size,
                self.config.hidden_size,
                quant_config=self.quant_config,
                org_num_embeddings=self.config.vocab_size,
                prefix=api.add_prefix("lm_head", prefix),
            )
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_embed_and_head(self) -> tuple[Tensor, Tensor]:
        return self.model.embed_tokens.weight, self.lm_head.weight

    def set_embed_and_head(self, embed: Tensor, head: Tensor) -> None:
        """Share the target's embedding and head with the draft."""
        self.set_embed(embed)
        if self.lm_head is not self.model.embed_tokens:
            del self.lm_head.weight
            self.lm_head.weight = head

    def set_lm_head_from_target(self, lm_head: nn.Module) -> None:
        """Share the target's layer too: how the weight lies, it alone knows, also when it is loaded again."""
        if self.lm_head is not self.model.embed_tokens:
            self.lm_head = lm_head

    def get_embed(self) -> Tensor:
        return self.model.embed_tokens.weight

    def set_embed(self, embed: Tensor) -> None:
        del self.model.embed_tokens.weight
        self.model.embed_tokens.weight = embed


class Qwen3NextModel(nn.Module):
    """Embedding, layers, final norm, with the ``forward`` that SGLang's graphs of prefill capture on its own."""

    def __init__(self, config: Qwen3NextConfig, engine: SglangEngine, embedding: nn.Module, *, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self._batch = engine.batch
        self.layers = nn.ModuleList(
            DecoderLayer(config, engine, kind, sparse=config.is_sparse(n), prefix=f"{prefix}.layers.{n}")
            for n, kind in enumerate(config.layer_types)
        )
        self.norm = engine.norm(config.hidden_size, config.rms_norm_eps)
        self._stack: Any = None
        if stacks_layers():
            from qnext_sglang.cpu.decoder_stack import DecoderLayers

            self._stack = DecoderLayers(list(self.layers), engine)  # type: ignore[arg-type]

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: api.ForwardBatch,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if forward_batch.forward_mode.is_idle():
            return hidden_states
        with self._batch.of(forward_batch):
            return self._run(hidden_states, positions, forward_batch)

    def _run(self, hidden_states: Tensor, positions: Tensor, forward_batch: api.ForwardBatch) -> Tensor:
        behind = None
        if self._stack is not None:
            behind = self._stack.run(hidden_states, positions, forward_batch)
        residual = None
        if behind is not None:
            hidden_states, residual = behind
        else:
            for layer in self.layers:
                hidden_states, residual = layer(hidden_states, residual, positions)
        return self.norm(hidden_states, residual)[0]


class Qwen3NextForCausalLM(ServedModel):
    """The class that SGLang's registry resolves ``Qwen3NextForCausalLM`` to."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config)
        folder = checkpoint_folder()
        if folder is not None and (shapes := self.stored_shapes()) is not None:
            check_files(folder, shapes, passing=(MTP_PREFIX,))
        self.model = Qwen3NextModel(
            self.qnext_config, self.engine, self.make_embedding(), prefix=api.add_prefix("model", prefix)
        )
        self.lm_head = self.make_head(prefix)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: api.ForwardBatch,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Any:
        hidden_states = self.model(input_ids, positions, forward_batch, inputs_embeds)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint, all of it the first time.

        Raises:
            CheckpointError: one whose tensors are known has others, or not all of them.
        """
        weights = ((name, tensor) for name, tensor in weights if not name.startswith(MTP_PREFIX))
        if is_int4(self.quant_config):
            weights = from_gptq(weights, self.quant_config.integers.bits)
        if (shapes := self.stored_shapes()) is not None:
            weights = checked_weights(weights, shapes, complete=not self.loads_parts)
        with unpacked_weights(self):
            loaded = load_parameters(self, weights, self.qnext_config.num_experts)
        self.loads_parts = True
        return loaded


EntryClass = Qwen3NextForCausalLM
