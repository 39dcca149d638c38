"""Qwen3NextMTP for vLLM: the shared draft model inside vLLM's embedding and head, which it shares with the target."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from qnext_plugins.model import MultiTokenPredictor, Qwen3NextConfig, checked_weights, from_gptq
from qnext_plugins.model.weights import MTP_PREFIX
from qnext_plugins.packed_methods import unpacked_weights
from qnext_vllm import vllm_api as api
from qnext_vllm.engine import VllmEngine
from qnext_vllm.linear import CpuInt4Config, on_our_kernel
from qnext_vllm.model import (
    PACKED_MODULES,
    STACKED,
    MixtureOfExpertsInfo,
    checkpoint_shapes,
    expects_checkpoint,
    reads_experts_of_a_rank,
)
from qnext_vllm.serving import prepare_process


@api.support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "hidden_states": 0, "inputs_embeds": 0})
class Qwen3NextMultiTokenPredictor(MultiTokenPredictor):
    """The draft with its embedding."""

    def __init__(self, *, vllm_config: api.VllmConfig, prefix: str = "") -> None:
        config = Qwen3NextConfig.from_hf(vllm_config.model_config.hf_config)
        super().__init__(config, VllmEngine(vllm_config), prefix=prefix)
        self.embed_tokens = api.VocabParallelEmbedding(config.vocab_size, config.hidden_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        inputs_embeds: Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.draft(inputs_embeds, hidden_states, positions, spec_step_idx)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As that of the target."""
        return api.AutoWeightsLoader(self).load_weights(weights, mapper=STACKED)


class Qwen3NextMTP(nn.Module, MixtureOfExpertsInfo):
    """The class that vLLM's registry resolves ``Qwen3NextMTP`` to."""

    packed_modules_mapping = PACKED_MODULES

    def __init__(self, *, vllm_config: api.VllmConfig, prefix: str = "") -> None:
        super().__init__()
        prepare_process(vllm_config, "Qwen3NextMTP")
        self.config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
        self.vllm_config, self.expects_checkpoint = vllm_config, expects_checkpoint(vllm_config)
        self.model = Qwen3NextMultiTokenPredictor(vllm_config=vllm_config, prefix=api.maybe_prefix(prefix, "mtp"))
        self.lm_head = on_our_kernel(
            api.ParallelLMHead(
                self.config.vocab_size, self.config.hidden_size, prefix=api.maybe_prefix(prefix, "lm_head")
            ),
            packable=not self.config.tie_word_embeddings,
        )
        self.logits_processor = api.LogitsProcessor(self.config.vocab_size)
        self.set_moe_parameters(self.model.layers)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        intermediate_tensors: api.IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> Tensor:
        return self.model(input_ids, positions, hidden_states, inputs_embeds, spec_step_idx)

    def compute_logits(self, hidden_states: Tensor, spec_step_idx: int = 0) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the draft's tensors of a checkpoint, or then what a trainer sends of them.

        Raises:
            CheckpointError: in a checkpoint, unquantized or in FP8 on a CPU, they are missing or misshapen.
        """
        weights = ((name, tensor) for name, tensor in weights if not self.is_unused_checkpoint_weight(name))
        if isinstance(self.vllm_config.quant_config, CpuInt4Config):
            weights = from_gptq(weights, self.vllm_config.quant_config.integers.bits)
        if self.expects_checkpoint:
            shapes = checkpoint_shapes(self.vllm_config, self.config, target=False, mtp=True)
            weights = checked_weights(weights, shapes, experts_of_a_rank=reads_experts_of_a_rank(self.vllm_config))
            self.expects_checkpoint = False
        renamed = api.WeightsMapper(orig_to_new_prefix={MTP_PREFIX: "model."})
        with unpacked_weights(self):
            return api.AutoWeightsLoader(self).load_weights(weights, mapper=renamed)

    @staticmethod
    def is_unused_checkpoint_weight(name: str) -> bool:
        """Whether the draft loads nothing of that name; vLLM leaves files that have nothing else unread."""
        return not name.startswith((MTP_PREFIX, "model.embed_tokens.", "lm_head."))
