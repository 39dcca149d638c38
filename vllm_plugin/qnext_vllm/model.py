"""Qwen3NextForCausalLM for vLLM: the shared layers inside vLLM's embedding, pipeline stages and head."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qnext_plugins.model import (
    DecoderLayer,
    Qwen3NextConfig,
    SparseMoe,
    check_files,
    checked_weights,
    expected_shapes,
    fp8_shapes,
    from_gptq,
    modules_of,
)
from qnext_plugins.model.weights import MTP_PREFIX
from qnext_plugins.packed_methods import unpacked_weights
from qnext_vllm import vllm_api as api
from qnext_vllm.decoder_stack import DecoderLayers, stacks_layers
from qnext_vllm.engine import VllmEngine
from qnext_vllm.gated_delta_net import state_dtypes, state_shapes
from qnext_vllm.linear import OURS_ON_CPU, CpuInt4Config, leaves_out, on_our_kernel
from qnext_vllm.serving import prepare_process

# Checkpoint tensors that vLLM keeps as one parameter.
STACKED = api.WeightsMapper(
    orig_to_new_stacked={
        ".q_proj": (".qkv_proj", "q"),
        ".k_proj": (".qkv_proj", "k"),
        ".v_proj": (".qkv_proj", "v"),
        ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
        ".mlp.up_proj": (".mlp.gate_up_proj", 1),
        ".shared_expert.gate_proj": (".shared_expert.gate_up_proj", 0),
        ".shared_expert.up_proj": (".shared_expert.gate_up_proj", 1),
    }
)
JOINED = api.WeightsMapper(
    orig_to_new_stacked={
        ".in_proj_qkvz": (".in_proj_qkvzba", 0),
        ".in_proj_ba": (".in_proj_qkvzba", 1),
    }
)
PACKED_MODULES = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "in_proj_qkvz": ["in_proj_qkvz"],
    "in_proj_ba": ["in_proj_ba"],
}


READ_AT_ONCE = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "npcache", "pt", "runai_streamer")
"""Load formats whose first weights are all of a checkpoint; behind others a trainer may send its tensors one by one."""


def expects_checkpoint(vllm_config: api.VllmConfig) -> bool:
    """Whether the first weights to be loaded are those of a whole checkpoint of a language model, of known shapes.

    They are known without quantization, and on a CPU in block-wise FP8 and in int4.
    """
    known = vllm_config.quant_config is None or isinstance(vllm_config.quant_config, OURS_ON_CPU)
    read = known and vllm_config.load_config.load_format in READ_AT_ONCE
    return read and vllm_config.model_config.runner_type != "pooling"  # where vLLM puts another head on the model


def checkpoint_shapes(vllm_config: api.VllmConfig, hf_config: Any, **parts: bool) -> dict[str, tuple[int, ...]]:
    """:func:`expected_shapes` of a checkpoint as it is stored."""
    shapes, quantization = expected_shapes(Qwen3NextConfig.from_hf(hf_config), **parts), vllm_config.quant_config
    if quantization is None:
        return shapes
    if isinstance(quantization, CpuInt4Config):
        return quantization.integers.shapes(shapes)
    return fp8_shapes(shapes, {module for module in modules_of(shapes) if leaves_out(quantization, module)})


def reads_experts_of_a_rank(vllm_config: api.VllmConfig) -> bool:
    """Whether vLLM passes over the experts of other ranks in a checkpoint's files."""
    parallel = vllm_config.parallel_config
    return parallel.enable_expert_parallel and parallel.enable_ep_weight_filter


class MixtureOfExpertsInfo(api.MixtureOfExperts):
    """What vLLM's expert-parallel load balancer asks of a model."""

    expert_weights: list[Any]
    moe_layers: list[Any]
    num_physical_experts: int
    num_logical_experts: int
    num_local_physical_experts: int

    def set_moe_parameters(self, layers: Iterable[nn.Module]) -> None:
        """Collect the experts of ``layers`` and their counts."""
        self.expert_weights = []
        blocks = (getattr(layer, "mlp", None) for layer in layers)
        self.moe_layers = [block.experts for block in blocks if isinstance(block, SparseMoe)]
        self.num_moe_layers = len(self.moe_layers)
        self.num_expert_groups, self.num_shared_experts = 1, 0
        if self.moe_layers:
            moe = self.moe_layers[0].moe_config
            self.num_logical_experts = self.num_routed_experts = moe.num_logical_experts
            self.num_physical_experts = moe.num_experts
            self.num_local_physical_experts = moe.num_local_experts
            self.num_redundant_experts = moe.num_experts - moe.num_logical_experts

    def update_physical_experts_metadata(self, num_physical_experts: int, num_local_physical_experts: int) -> None:
        assert self.num_local_physical_experts == num_local_physical_experts
        self.num_physical_experts = num_physical_experts
        self.num_redundant_experts = num_physical_experts - self.num_logical_experts
        for experts in self.moe_layers:
            experts.update_expert_map()


TOKEN_DIMS = {"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0}


@api.support_torch_compile(dynamic_arg_dims=TOKEN_DIMS)
class Qwen3NextModel(nn.Module, api.EagleModelMixin):
    """Embedding, this pipeline stage's layers, final norm."""

    layers: nn.ModuleList
    norm: nn.Module

    def __init__(self, *, vllm_config: api.VllmConfig, prefix: str = "") -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_text_config
        config = Qwen3NextConfig.from_hf(hf_config)
        config.check_tensor_parallel(vllm_config.parallel_config.tensor_parallel_size)
        engine = VllmEngine(vllm_config)
        self.embed_tokens = api.VocabParallelEmbedding(config.vocab_size, config.hidden_size)

        def make_layer(prefix: str) -> DecoderLayer:
            n = api.extract_layer_index(prefix)
            return DecoderLayer(config, engine, config.layer_types[n], sparse=config.is_sparse(n), prefix=prefix)

        self.start_layer, self.end_layer, self.layers = api.make_layers(
            config.num_hidden_layers, make_layer, prefix=f"{prefix}.layers"
        )
        stage: list[Any] = list(self.layers[self.start_layer : self.end_layer])
        self._stack = None
        if stacks_layers(vllm_config) and stage:
            name = api.maybe_prefix(prefix, "stack")
            self._stack = DecoderLayers(stage, self._one_by_one, engine, vllm_config, name)
        last = api.get_pp_group().is_last_rank
        self.norm = engine.norm(config.hidden_size, config.rms_norm_eps) if last else api.PPMissingLayer()
        self.make_empty_intermediate_tensors = api.make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor | None) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: api.IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | api.IntermediateTensors | tuple[Tensor, list[Tensor]]:
        if api.get_pp_group().is_first_rank:
            hidden_states = inputs_embeds if inputs_embeds is not None else self.embed_input_ids(input_ids)
            residual = None
        else:
            assert intermediate_tensors is not None
            hidden_states, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        auxiliary = self._maybe_add_hidden_state([], 0, hidden_states, residual)  # type: ignore[operator]
        if self._stack is not None and not self.aux_hidden_state_layers:
            hidden_states, residual = self._stack(hidden_states, residual, positions)
        else:
            hidden_states, residual = self._one_by_one(hidden_states, residual, positions, auxiliary)
        if not api.get_pp_group().is_last_rank:
            return api.IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        hidden_states, _ = self.norm(hidden_states, residual)
        return (hidden_states, auxiliary) if auxiliary else hidden_states

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load what is left when the whole model's loader has named the scales of a cache, no parts of ``qkv_proj``."""
        joined = any(".in_proj_qkvzba." in name for name, _ in self.named_parameters())
        return api.AutoWeightsLoader(self).load_weights(weights, mapper=STACKED | JOINED if joined else STACKED)

    def _one_by_one(
        self, hidden_states: Tensor, residual: Tensor | None, positions: Tensor, auxiliary: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The layers, and into ``auxiliary`` what drafts want to see of them."""
        for n, layer in enumerate(islice(self.layers, self.start_layer, self.end_layer), start=self.start_layer):
            hidden_states, residual = layer(hidden_states, residual, positions)
            if auxiliary is not None:
                self._maybe_add_hidden_state(auxiliary, n + 1, hidden_states, residual)  # type: ignore[operator]
        assert residual is not None, "a stage has layers"
        return hidden_states, residual


class Qwen3NextForCausalLM(
    nn.Module,
    api.HasInnerState,
    api.SupportsLoRA,
    api.SupportsPP,
    MixtureOfExpertsInfo,
    api.IsHybrid,
    api.SupportsEagle3,
):
    """The class that vLLM's registry resolves ``Qwen3NextForCausalLM`` to."""

    packed_modules_mapping = PACKED_MODULES

    def __init__(self, *, vllm_config: api.VllmConfig, prefix: str = "") -> None:
        super().__init__()
        prepare_process(vllm_config, "Qwen3NextForCausalLM")
        self.vllm_config = vllm_config
        self.config = vllm_config.model_config.hf_text_config
        self.expects_checkpoint = expects_checkpoint(vllm_config)
        if self.expects_checkpoint and vllm_config.load_config.load_format in ("auto", "safetensors"):
            shapes = checkpoint_shapes(vllm_config, self.config)
            check_files(Path(vllm_config.model_config.model), shapes, passing=(MTP_PREFIX,))
        self.quant_config = vllm_config.quant_config
        self.model = Qwen3NextModel(vllm_config=vllm_config, prefix=api.maybe_prefix(prefix, "model"))
        self.lm_head = on_our_kernel(
            api.ParallelLMHead(
                self.config.vocab_size, self.config.hidden_size, prefix=api.maybe_prefix(prefix, "lm_head")
            ),
            packable=not self.config.tie_word_embeddings,
        )
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = api.LogitsProcessor(self.config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.set_moe_parameters(self.model.layers)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: api.IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | api.IntermediateTensors | tuple[Tensor, list[Tensor]]:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint, or then what a trainer sends of one.

        Raises:
            CheckpointError: a checkpoint, unquantized or in FP8 on a CPU, has missing, surplus or misshapen tensors.
        """
        if isinstance(self.quant_config, CpuInt4Config):
            weights = from_gptq(weights, self.quant_config.integers.bits)
        if self.expects_checkpoint:
            shapes = checkpoint_shapes(self.vllm_config, self.config)
            of_a_rank = reads_experts_of_a_rank(self.vllm_config)
            weights = checked_weights(weights, shapes, passing=(MTP_PREFIX,), experts_of_a_rank=of_a_rank)
            self.expects_checkpoint = False
        skipped = api.WeightsMapper(orig_to_new_prefix={MTP_PREFIX: None})
        with unpacked_weights(self):
            return api.AutoWeightsLoader(self).load_weights(weights, mapper=skipped)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: api.VllmConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return state_shapes(Qwen3NextConfig.from_hf(vllm_config.model_config.hf_text_config), vllm_config)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: api.VllmConfig) -> tuple[torch.dtype, torch.dtype]:
        return state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple:
        return api.MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func()
