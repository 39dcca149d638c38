"""Which vLLM symbols the plugin stands on. When an engine update breaks one, the test that fails carries its name."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import vllm

import qnext_vllm
from qnext_vllm.block_copies import RUNNERS
from qnext_vllm.config_hook import INT4_METHODS
from qnext_vllm.gated_delta_net import VLLMS_OPERATOR
from qnext_vllm.host_kernels import HOST_KERNELS
from qnext_vllm.linear import QnextFp8LinearMethod

PACKAGE = Path(qnext_vllm.__file__).parent

# Arguments that we pass by name.
PARAMETERS: dict[str, set[str]] = {
    "vllm.model_executor.layers.linear.ColumnParallelLinear": {"bias", "return_bias", "quant_config", "prefix"},
    "vllm.model_executor.layers.linear.MergedColumnParallelLinear": {"bias", "return_bias", "quant_config", "prefix"},
    "vllm.model_executor.layers.linear.QKVParallelLinear": {"bias", "return_bias", "quant_config", "prefix"},
    "vllm.model_executor.layers.linear.ReplicatedLinear": {"bias", "return_bias", "quant_config", "prefix"},
    "vllm.model_executor.layers.linear.RowParallelLinear": {
        "bias",
        "return_bias",
        "quant_config",
        "prefix",
        "reduce_results",
    },
    "vllm.model_executor.layers.attention.Attention": {"num_kv_heads", "cache_config", "quant_config", "prefix"},
    "vllm.model_executor.layers.fused_moe.FusedMoEFactory": {
        "num_experts",
        "top_k",
        "hidden_size",
        "intermediate_size",
        "renormalize",
        "quant_config",
        "prefix",
        "shared_experts",
        "custom_routing_function",
        "enable_eplb",
        "num_redundant_experts",
        "routed_experts_cls",
        "routed_experts_args",
    },
    "vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner.forward": {"hidden_states", "router_logits"},
    "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod.apply": {
        "layer",
        "x",
        "topk_weights",
        "topk_ids",
        "shared_experts",
        "shared_experts_input",
    },
    "vllm.model_executor.layers.fused_moe.routed_experts.RoutedExperts._get_quant_method": {
        "prefix",
        "quant_config",
        "moe_config",
    },
    "vllm.model_executor.layers.quantization.utils.quant_utils.is_layer_skipped": {
        "prefix",
        "ignored_layers",
        "fused_mapping",
        "match_mode",
    },
    "vllm.model_executor.parameter.PackedvLLMParameter.__init__": {"packed_factor", "packed_dim"},
    "vllm.model_executor.parameter.BasevLLMParameter.__init__": {"data", "weight_loader"},
    "vllm.model_executor.layers.quantization.utils.fp8_utils.create_fp8_weight_parameter": {
        "output_size_per_partition",
        "input_size_per_partition",
        "weight_loader",
    },
    "vllm.model_executor.layers.quantization.utils.fp8_utils.create_fp8_scale_parameter": {
        "parameter_type",
        "output_partition_sizes",
        "input_size_per_partition",
        "block_size",
        "weight_loader",
    },
    "vllm.model_executor.layers.rotary_embedding.get_rope": {"head_size", "max_position", "rope_parameters", "dtype"},
    "vllm.compilation.decorators.support_torch_compile": {"dynamic_arg_dims"},
    "vllm.model_executor.models.utils.AutoWeightsLoader.load_weights": {"weights", "mapper"},
    "vllm.model_executor.models.utils.WeightsMapper": {"orig_to_new_prefix", "orig_to_new_stacked"},
    "vllm.v1.sample.ops.topk_topp_sampler.apply_top_k_top_p": {"logits", "k", "p"},
    "vllm.v1.sample.sampler.Sampler.gather_logprobs": {"logprobs", "num_logprobs", "token_ids"},
    "vllm.v1.worker.cpu_model_runner.CPUModelRunner.sample_tokens": {"grammar_output"},
    "vllm.v1.worker.utils.copy_kv_cache_blocks_inplace": {"kv_caches", "num_blocks", "kv_cache_block_copies"},
    "vllm.model_executor.models.interfaces.EagleModelMixin._maybe_add_hidden_state": {
        "aux_hidden_states",
        "layer_idx",
        "hidden_states",
        "residual",
    },
}

# Fields that we read.
FIELDS: dict[str, set[str]] = {
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadata": {
        "num_actual_tokens",
        "slot_mapping",
        "block_table",
        "seq_lens",
        "query_start_loc",
        "causal",
    },
    "vllm.v1.attention.backends.gdn_attn.GDNAttentionMetadata": {
        "num_prefills",
        "num_prefill_tokens",
        "num_decodes",
        "num_decode_tokens",
        "num_spec_decodes",
        "num_spec_decode_tokens",
        "has_initial_state",
        "spec_query_start_loc",
        "non_spec_query_start_loc",
        "spec_state_indices_tensor",
        "non_spec_state_indices_tensor",
        "spec_sequence_masks",
        "spec_token_indx",
        "non_spec_token_indx",
        "num_accepted_tokens",
        "checkpoint",
    },
    "vllm.model_executor.layers.mamba.checkpoint.MambaPrefillCheckpointMetadata": {
        "checkpoint_offsets",
        "state_indices",
    },
    "vllm.config.PassConfig": {"fuse_allreduce_rms"},
    "vllm.v1.kv_cache_interface.MambaSpec": {"num_prefill_checkpoint_blocks", "prefill_checkpoint_alignment"},
    "vllm.forward_context.ForwardContext": {"attn_metadata", "no_compile_layers", "additional_kwargs"},
    "vllm.config.VllmConfig": {"additional_config", "quant_config"},
    "vllm.config.ModelConfig": {"quantization", "quantization_config", "hf_config"},
    "vllm.config.CacheConfig": {"mamba_ssm_cache_dtype", "mamba_cache_dtype"},
    "vllm.config.CompilationConfig": {"static_forward_context", "splitting_ops"},
    "vllm.config.KernelConfig": {"moe_backend", "linear_backend", "linear_backend_per_quant"},
    "vllm.config.ParallelConfig": {
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "enable_eplb",
        "enable_expert_parallel",
        "enable_ep_weight_filter",
        "eplb_config",
    },
    "vllm.model_executor.layers.fused_moe.config.FusedMoEConfig": {
        "num_experts",
        "num_logical_experts",
        "num_local_experts",
        "intermediate_size_per_partition",
        "in_dtype",
        "device",
    },
}

# Methods and attributes that we override or call.
ATTRIBUTES: dict[str, set[str]] = {
    "vllm.model_executor.layers.mamba.abstract.MambaBase": {
        "bind_kv_cache",
        "get_state_shape",
        "get_state_dtype",
        "mamba_type",
        "get_attn_backend",
        "get_kv_cache_spec",
    },
    "vllm.v1.attention.backends.registry.MambaAttentionBackendEnum": {"GDN_ATTN"},
    "vllm.model_executor.layers.mamba.mamba_utils.MambaStateShapeCalculator": {"gated_delta_net_state_shape"},
    "vllm.model_executor.layers.mamba.mamba_utils.MambaStateDtypeCalculator": {"gated_delta_net_state_dtype"},
    "vllm.model_executor.layers.mamba.mamba_utils.MambaStateCopyFuncCalculator": {"gated_delta_net_state_copy_func"},
    "vllm.model_executor.layers.fused_moe.routed_experts.RoutedExperts": {"_get_quant_method", "expert_map"},
    "vllm.model_executor.layers.fused_moe.oracle.unquantized.UnquantizedMoeBackend": {"OOT"},
    "vllm.model_executor.layers.quantization.fp8.Fp8MoEMethod": {
        "process_weights_after_loading",
        "get_fused_moe_quant_config",
        "apply",
    },
    "vllm.model_executor.layers.quantization.fp8.Fp8Config": {
        "from_config",
        "get_quant_method",
        "get_supported_act_dtypes",
    },
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors.CompressedTensorsConfig": {
        "from_config",
        "get_quant_method",
    },
    "vllm.model_executor.models.config": {"MODELS_CONFIG_MAP", "VerifyAndUpdateConfig"},
    "vllm.model_executor.models.config.VerifyAndUpdateConfig": {"verify_and_update_config"},
    "vllm.model_executor.models.registry.ModelRegistry": {"register_model"},
    "vllm.envs": {"VLLM_BATCH_INVARIANT"},
    "vllm.model_executor.determinism.batch_invariant": {"enable_batch_invariant_mode"},
    "vllm.v1.attention.backend.AttentionBackend": {"supports_batch_invariance", "forward_includes_kv_cache_update"},
    "vllm.v1.outputs.LogprobsTensors": {"logprob_token_ids", "logprobs", "selected_token_ranks"},
    "vllm.triton_utils": {"HAS_TRITON"},
    "vllm.v1.sample.rejection_sampler": {"apply_top_k_top_p"},
    "vllm.triton_utils.dispatcher": {"KernelOverride"},
    "vllm.utils.cpu_resource_utils": {"get_visible_memory_node"},
    "vllm.platforms.current_platform": {
        "is_cpu",
        "is_cuda",
        "is_cuda_alike",
        "device_name",
        "get_device_capability",
    },
    "vllm.platforms.interface.DeviceCapability": {"major", "as_version_str"},
}


def resolve(path: str) -> Any:
    """Import a dotted path whose tail may be attributes."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name and not path.startswith(error.name):
                raise
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"vLLM {vllm.__version__} has no {path}")


def imported_symbols() -> list[str]:
    """Every ``vllm…`` name that a module of the plugin imports."""
    symbols = set()
    for source in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                symbols |= {f"{node.module}.{alias.name}" for alias in node.names}
    return sorted(symbols)


def test_only_the_named_modules_import_vllm() -> None:
    named = {"vllm_api.py", "config_hook.py", "doctor.py", "host_kernels.py", "__init__.py"}
    named |= {"determinism.py", "block_copies.py", "seeded_prefill.py"}
    importing = {
        source.name
        for source in PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(source.read_text()))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "vllm" for alias in node.names))
    }
    assert importing <= named


@pytest.mark.parametrize("symbol", imported_symbols())
def test_symbol_exists(symbol: str) -> None:
    resolve(symbol)


@pytest.mark.parametrize("symbol", PARAMETERS)
def test_symbol_takes_our_arguments(symbol: str) -> None:
    parameters = set(inspect.signature(resolve(symbol)).parameters)
    missing = PARAMETERS[symbol] - parameters
    assert not missing, f"vLLM {vllm.__version__}: {symbol} no longer takes {sorted(missing)}"


@pytest.mark.parametrize("symbol", FIELDS)
def test_dataclass_has_our_fields(symbol: str) -> None:
    found = resolve(symbol)
    fields = {field.name for field in dataclasses.fields(found)} | set(dir(found))
    missing = FIELDS[symbol] - fields
    assert not missing, f"vLLM {vllm.__version__}: {symbol} lost {sorted(missing)}"


@pytest.mark.parametrize("symbol", ATTRIBUTES)
def test_symbol_has_our_attributes(symbol: str) -> None:
    missing = {name for name in ATTRIBUTES[symbol] if not hasattr(resolve(symbol), name)}
    assert not missing - set(getattr(resolve(symbol), "__annotations__", {})), (
        f"vLLM {vllm.__version__}: {symbol} lost {sorted(missing)}"
    )


@pytest.mark.parametrize("name", HOST_KERNELS)
def test_host_kernel_takes_the_arguments_of_the_triton_kernel(name: str) -> None:
    module, _, function = name.rpartition(".")
    tree = ast.parse(Path(resolve(module).__file__).read_text())
    kernel = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    theirs = [argument.arg for argument in kernel.args.args]
    ours = list(inspect.signature(HOST_KERNELS[name]).parameters)
    assert ours == theirs, f"vLLM {vllm.__version__}: the arguments of {name} changed"


def test_a_draw_of_an_unfinished_prompt_is_still_taken_back_by_an_offset() -> None:
    bookkeeping = inspect.getsource(resolve("vllm.v1.worker.gpu_model_runner.GPUModelRunner._bookkeeping_sync"))
    for needed in ("self.discard_request_mask.np[:num_reqs]", "self.input_batch.generators.get", "gen.set_offset("):
        assert needed in bookkeeping, f"vLLM {vllm.__version__}: is qnext_vllm.seeded_prefill needed any more?"


@pytest.mark.parametrize("runner", RUNNERS)
def test_model_runners_copy_blocks_by_the_name_that_we_replace(runner: str) -> None:
    source = (Path(vllm.__file__).parents[1] / (runner.replace(".", "/") + ".py")).read_text()
    assert "            copy_kv_cache_blocks_inplace(" in source


def test_the_sampler_reads_the_generators_of_the_batch_itself() -> None:
    make = inspect.getsource(resolve("vllm.v1.worker.gpu_input_batch.InputBatch._make_sampling_metadata"))
    assert "generators=self.generators" in make, f"vLLM {vllm.__version__}: withholding a generator changes nothing"


def test_the_mode_is_switched_on_by_the_name_that_we_replace() -> None:
    switch = inspect.getsource(resolve("vllm.model_executor.determinism.batch_invariant.init_batch_invariance"))
    assert "enable_batch_invariant_mode()" in switch


@pytest.mark.parametrize(
    "method", ["linear.UnquantizedLinearMethod", "vocab_parallel_embedding.UnquantizedEmbeddingMethod"]
)
def test_in_its_mode_vllm_multiplies_linears_and_heads_invariantly_on_a_gpu(method: str) -> None:
    assert "linear_batch_invariant" in inspect.getsource(resolve(f"vllm.model_executor.layers.{method}.apply"))


def test_in_its_mode_vllm_multiplies_block_wise_fp8_in_one_configuration_on_triton() -> None:
    product = "vllm.model_executor.layers.quantization.utils.fp8_utils.w8a8_triton_block_scaled_mm"
    assert "if envs.VLLM_BATCH_INVARIANT:\n        configs = None" in inspect.getsource(resolve(product))


def test_vllm_splits_its_graphs_at_the_operator_that_ours_stands_for() -> None:
    namespace, _, name = VLLMS_OPERATOR.partition("::")
    importlib.import_module("vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn")
    assert hasattr(getattr(resolve("torch.ops"), namespace), name)
    assert VLLMS_OPERATOR in resolve("vllm.config.CompilationConfig")._attention_ops


def test_experts_of_an_out_of_tree_backend_are_not_padded() -> None:
    round_up = resolve(
        "vllm.model_executor.layers.fused_moe.oracle.unquantized.unquantized_round_up_hidden_size_and_intermediate_size"
    )
    backend = resolve("vllm.model_executor.layers.fused_moe.oracle.unquantized.UnquantizedMoeBackend")
    assert round_up(backend.OOT, 72, 24) == (72, 24)


def test_the_configuration_hook_comes_before_vllm_reads_the_quantization() -> None:
    check = inspect.getsource(resolve("vllm.config.VllmConfig.__post_init__"))
    assert 0 < check.index("self.try_verify_and_update_config()") < check.index("if self.quant_config is None and")


def test_every_forward_pass_has_a_context_of_its_own() -> None:
    create = inspect.getsource(resolve("vllm.forward_context.create_forward_context"))
    assert "additional_kwargs=additional_kwargs or {}" in create


def test_the_scales_of_our_fp8_linears_are_loaded_by_blocks() -> None:
    linear = resolve("vllm.model_executor.layers.linear")
    assert QnextFp8LinearMethod.__name__ in linear.WEIGHT_LOADER_V2_SUPPORTED
    for kind in ("MergedColumnParallelLinear", "QKVParallelLinear"):
        load = inspect.getsource(getattr(linear, kind).weight_loader_v2)
        assert "isinstance(param, BlockQuantScaleParameter)" in load
        assert 'getattr(self, "weight_block_size", None)' in load


def test_the_loader_asks_the_model_which_tensors_it_leaves() -> None:
    loader = resolve("vllm.model_executor.model_loader.default_loader.DefaultModelLoader")
    assert 'getattr(model, "is_unused_checkpoint_weight", None)' in inspect.getsource(loader)


def test_fp8_weights_and_scales_have_the_names_that_we_read() -> None:
    method = resolve("vllm.model_executor.layers.quantization.fp8.Fp8MoEMethod")
    assert '"weight_scale_inv" if self.block_quant' in inspect.getsource(method.__init__)
    create = inspect.getsource(method.create_weights)
    for name in ('"w13_weight"', '"w2_weight"', 'f"w13_{self.weight_scale_name}"', 'f"w2_{self.weight_scale_name}"'):
        assert f"layer.register_parameter({name}, " in create
    linear = inspect.getsource(resolve("vllm.model_executor.layers.quantization.fp8.Fp8LinearMethod.create_weights"))
    for name in ('"weight"', '"weight_scale_inv"'):
        assert f"layer.register_parameter({name}, " in linear
    config = resolve("vllm.model_executor.layers.quantization.fp8.Fp8Config")()
    for name in ("ignored_layers", "ignored_layers_match_mode", "packed_modules_mapping", "weight_block_size"):
        assert hasattr(config, name)


@pytest.mark.parametrize(("config", "method"), [("auto_gptq.AutoGPTQConfig", "gptq"), ("inc.INCConfig", "auto-round")])
def test_vllm_has_the_names_for_gptq_and_autoround_that_the_configuration_hook_knows(config: str, method: str) -> None:
    own = resolve(f"vllm.model_executor.layers.quantization.{config}")
    assert own.override_quantization_method({"quant_method": method}, None) in INT4_METHODS


def test_experts_in_int4_are_loaded_by_the_names_and_attributes_that_we_give() -> None:
    package = "vllm.model_executor.layers.quantization.compressed_tensors"
    config = resolve(f"{package}.compressed_tensors.CompressedTensorsConfig")
    assert "config" in inspect.signature(config).parameters
    method = resolve(f"{package}.compressed_tensors_moe.compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod")
    create = inspect.getsource(method.create_weights)
    for matrix in ("w13", "w2"):
        for kind in ("packed", "scale", "shape"):
            assert f'layer.register_parameter("{matrix}_weight_{kind}", ' in create
    loader = inspect.getsource(
        resolve("vllm.model_executor.layers.fused_moe.routed_experts.RoutedExperts.weight_loader")
    )
    for read in ('getattr(param, "is_transposed", False)', 'getattr(param, "quant_method", None)', '"weight_shape"'):
        assert read in loader
    for name in ("PackedvLLMParameter", "GroupQuantScaleParameter"):
        parameter = resolve(f"vllm.model_executor.parameter.{name}")
        assert {"input_dim", "output_dim"} <= set(dir(parameter)), name
    supported = resolve("vllm.model_executor.layers.fused_moe.FusedMoeWeightScaleSupported")
    assert supported.GROUP.value == "group"
