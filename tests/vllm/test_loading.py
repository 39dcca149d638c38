"""Checkpoints that are quantized or read in part, and weights that a trainer sends to a model that serves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.model_executor.model_loader import DefaultModelLoader, get_model
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.utils import initialize_model

from qnext_plugins.cli.checkpoint.tensors import describe_int4
from qnext_plugins.model import CheckpointError, Qwen3NextConfig
from qnext_plugins.packed_methods import PackedLinear, unpacked_weights
from qnext_vllm.engine import VllmEngine
from qnext_vllm.linear import CpuInt4Config, QnextFp8LinearMethod, cpu_fp8_config, cpu_int4_config, leaves_out
from qnext_vllm.model import Qwen3NextForCausalLM
from qnext_vllm.mtp import Qwen3NextMTP
from tests.checkpoints import TINY


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmConfig]:
    """Of the tiny checkpoint, in a process that makes vLLM's layers."""
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's worker on a CPU does
    found = EngineArgs(str(TINY), dtype="float32", max_model_len=128).create_engine_config()
    with set_current_vllm_config(found):
        parallel_state.init_distributed_environment(1, 0, f"file://{tmp_path}/ranks", 0, "gloo")
        parallel_state.initialize_model_parallel()
        yield found
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def checkpoint() -> dict[str, Tensor]:
    return load_file(TINY / "model.safetensors")


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """As they are loaded."""
    with unpacked_weights(model):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def packed(model: nn.Module) -> dict[str, bool]:
    """Whether each layer on our kernels is."""
    return {name: layer.packed for name, layer in model.named_modules() if hasattr(layer, "packed")}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


def test_a_trainer_sends_tensor_by_tensor_and_vllm_puts_each_layer_together_anew(config: VllmConfig) -> None:
    model: Any = get_model(vllm_config=config)
    addresses, before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}, packed(model)
    initialize_layerwise_reload(model)
    for name, tensor in checkpoint().items():
        model.load_weights([(name, 2 * tensor)])
    finalize_layerwise_reload(model, config.model_config)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == addresses
    assert packed(model) == before, "a compiled graph knows no other layout"
    found = parameters(model)
    config.compilation_config.static_forward_context.clear()
    expected = {name: 2 * tensor for name, tensor in parameters(get_model(vllm_config=config)).items()}
    assert differing(found, expected) == []


def test_a_trainer_fills_a_model_that_has_been_loaded_from_nothing(config: VllmConfig) -> None:
    expected = parameters(get_model(vllm_config=config))
    config.compilation_config.static_forward_context.clear()
    config.load_config.load_format = "dummy"
    model: Any = get_model(vllm_config=config)
    assert differing(parameters(model), expected)
    for name, tensor in checkpoint().items():
        model.load_weights([(name, tensor)])
    assert differing(parameters(model), expected) == []


def test_a_trainer_sends_the_drafts_tensors_one_by_one(config: VllmConfig) -> None:
    config.load_config.load_format = "dummy"
    draft = Qwen3NextMTP(vllm_config=config)
    loaded = set().union(*(draft.load_weights([weight]) for weight in checkpoint().items()))
    assert loaded == {name for name, _ in draft.named_parameters()}


def test_of_a_checkpoint_in_several_files_those_without_a_tensor_of_the_draft_are_not_read(
    config: VllmConfig, tmp_path: Path
) -> None:
    draft = Qwen3NextMTP(vllm_config=config)
    layers = {name: tensor for name, tensor in checkpoint().items() if name.startswith("model.layers.")}
    rest = {name: tensor for name, tensor in checkpoint().items() if name not in layers}
    save_file(layers, tmp_path / "model-00001-of-00002.safetensors")
    save_file(rest, tmp_path / "model-00002-of-00002.safetensors")
    config.model_config.model = str(tmp_path)
    loader = DefaultModelLoader(config.load_config)
    assert {name for name, _ in loader.get_all_weights(config.model_config, draft)} == rest.keys()


def test_scales_of_a_cache_in_fp8_go_to_the_attention_whatever_projection_they_are_named_after(
    config: VllmConfig,
) -> None:
    config.quant_config = Fp8Config(ignored_layers=["layers"])
    config.quant_config.ignored_layers_match_mode = "substring"
    model: Any = initialize_model(config)
    model.load_weights([("model.layers.3.self_attn.k_proj.output_scale", torch.tensor(0.5))])
    assert model.model.layers[3].self_attn.attn.k_scale == 0.5


def test_experts_of_other_ranks_may_be_missing_where_vllm_does_not_read_them(config: VllmConfig) -> None:
    config.load_config.load_format = "dummy"
    model: Any = get_model(vllm_config=config)
    without = {name: tensor for name, tensor in checkpoint().items() if ".experts.0." not in name}
    model.expects_checkpoint = True
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.0\.mlp\.experts\.0\."):
        model.load_weights(without.items())
    config.parallel_config.enable_expert_parallel = config.parallel_config.enable_ep_weight_filter = True
    model.load_weights(without.items())
    del without["model.norm.weight"]
    model.expects_checkpoint = True
    with pytest.raises(CheckpointError, match=r"missing model\.norm\.weight$"):
        model.load_weights(without.items())


def test_a_classifier_has_a_head_of_its_own(config: VllmConfig) -> None:
    classifier = EngineArgs(
        str(TINY), dtype="float32", max_model_len=128, runner="pooling", convert="classify"
    ).create_engine_config()
    model: Any = initialize_model(classifier)
    weights = checkpoint()
    del weights["lm_head.weight"]
    head = weights["score.weight"] = torch.randn_like(model.score.weight)
    model.load_weights(weights.items())
    assert torch.equal(model.score.weight, head)


IN_FOUR_BITS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "awq": {"bits": 4, "group_size": 32, "zero_point": True},
    "compressed-tensors": {
        "format": "pack-quantized",
        "config_groups": {
            "all": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
            }
        },
    },
}


@pytest.mark.parametrize("method", IN_FOUR_BITS)
def test_a_linear_in_four_bits_is_vllms(config: VllmConfig, method: str) -> None:
    options = IN_FOUR_BITS[method] | {"quant_method": method}
    config.quant_config = get_quantization_config(method).from_config(options)
    linear = VllmEngine(config).column_linear(128, 256, prefix="model.layers.0.linear_attn.in_proj_qkvz")
    assert not hasattr(linear, "weight")
    assert not isinstance(linear.quant_method, PackedLinear | UnquantizedLinearMethod)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda engine: engine.gate_up_linear(256, 192, prefix="mlp.gate_up_proj"), r"mlp\.gate_up_proj: .* 128 rows"),
        (lambda engine: engine.column_linear(256, 384, prefix="linear_attn.in_proj_qkvz"), r"in_proj_qkvz: .*got 192"),
        (lambda engine: engine.row_linear(384, 256, reduce=True, prefix="o_proj"), r"o_proj: .* 128 columns .*got 192"),
    ],
)
def test_in_fp8_each_matrix_of_a_rank_has_whole_blocks(
    config: VllmConfig, make: Callable[[VllmEngine], nn.Module], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.quant_config = cpu_fp8_config(FP8)
    monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_world_size", lambda: 2)
    with pytest.raises(ValueError, match=message):
        make(VllmEngine(config))


def test_in_fp8_rows_behind_the_last_whole_block_have_a_scale(config: VllmConfig) -> None:
    config.quant_config = cpu_fp8_config(FP8)
    linear: Any = VllmEngine(config).column_linear(200, 320, prefix="linear_attn.in_proj_qkvz")
    assert isinstance(linear.quant_method, QnextFp8LinearMethod)
    assert linear.weight.dtype == torch.float8_e4m3fn
    assert linear.weight_scale_inv.shape == (3, 2)
    assert linear.weight_scale_inv.dtype == torch.float32


@pytest.mark.parametrize(
    "other", [{"weight_block_size": [64, 64]}, {"weight_block_size": None}, {"store_dtype": "mxfp4"}]
)
def test_fp8_that_is_stored_otherwise_is_vllms(other: dict[str, Any]) -> None:
    assert cpu_fp8_config(FP8) is not None
    assert cpu_fp8_config(FP8 | other) is None
    assert cpu_fp8_config(None) is None


def test_a_layer_that_an_fp8_checkpoint_leaves_out_is_not_quantized(config: VllmConfig) -> None:
    config.quant_config = cpu_fp8_config(FP8 | {"modules_to_not_convert": ["mtp.fc"]})
    fc = VllmEngine(config).replicated_linear(256, 128, quantized=True, prefix="mtp.fc")
    assert isinstance(fc.quant_method, UnquantizedLinearMethod)


@pytest.mark.parametrize(
    ("listed", "module", "left_out"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.q_proj", True),
        ("model.layers.3.self_attn.qkv_proj", "model.layers.3.self_attn.q_proj", True),
        ("model.layers.3.self_attn.qkv_proj", "model.layers.13.self_attn.q_proj", False),
        ("model.layers.3.self_attn.qkv_proj", "model.layers.3.self_attn.o_proj", False),
    ],
)
def test_an_fp8_checkpoint_may_list_a_layer_as_vllm_merges_it(listed: str, module: str, left_out: bool) -> None:
    described = cpu_fp8_config(FP8 | {"modules_to_not_convert": [listed]})
    assert described is not None
    described.packed_modules_mapping = Qwen3NextForCausalLM.packed_modules_mapping
    assert leaves_out(described, module) == left_out


def test_in_int4_a_row_of_a_rank_has_whole_groups(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config.quant_config = cpu_int4_config(describe_int4([], 64))
    engine = VllmEngine(config)
    odd = replace(Qwen3NextConfig.from_hf(config.model_config.hf_text_config), moe_intermediate_size=160)
    with pytest.raises(ValueError, match=r"^w2 of the experts: expected whole groups of 64 .*got 160 columns"):
        engine.experts(odd, None, prefix="model.layers.0.mlp.experts")
    monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"o_proj: expected whole groups of 64 columns on a rank, got 96 columns"):
        engine.row_linear(192, 256, reduce=True, prefix="o_proj")


def test_int4_that_is_stored_otherwise_is_vllms() -> None:
    described = describe_int4([], 64)
    assert type(cpu_int4_config(copy.deepcopy(described))) is CpuInt4Config
    described["config_groups"]["group_0"]["weights"]["symmetric"] = False
    assert cpu_int4_config(described) is None
    assert cpu_int4_config(None) is None


def test_experts_of_a_rank_in_fp8_have_whole_blocks(config: VllmConfig) -> None:
    config.quant_config = cpu_fp8_config(FP8)
    engine = VllmEngine(config)
    odd = replace(Qwen3NextConfig.from_hf(config.model_config.hf_text_config), moe_intermediate_size=192)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: a rank's 192 columns of them are not whole blocks"):
        engine.experts(odd, None, prefix="model.layers.0.mlp.experts")


def test_in_a_checkpoint_in_nvfp4_the_drafts_fc_is_not_quantized(config: VllmConfig) -> None:
    config.quant_config = ModelOptNvFp4Config()
    fc = VllmEngine(config).replicated_linear(256, 128, quantized=True, prefix="mtp.fc")
    assert isinstance(fc.quant_method, UnquantizedLinearMethod)
