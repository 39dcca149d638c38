"""Which SGLang symbols the plugin stands on. When an engine update breaks one, the test that fails carries its name."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import textwrap
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import qnext_sglang
from qnext_plugins.cli.checkpoint.tensors import describe_int4
from qnext_plugins.model import STORED_IN_INT4
from qnext_sglang import MODELS_VARIABLE, determinism, hooks, serving
from qnext_sglang.cpu import attention, defaults, gated_delta_net, platform, speculation
from qnext_sglang.cpu import hooks as cpu_hooks
from qnext_sglang.experts import (
    QnextFp8MoEMethod,
    QnextFusedMoE,
    QnextInt4MoEMethod,
    QnextMoEMethod,
    SharedFp8LinearMethod,
)
from qnext_sglang.gated_delta_net import GatedDeltaNetBackend
from qnext_sglang.linear import QnextFp8LinearMethod, QnextInt4LinearMethod, QnextInt8LinearMethod
from qnext_sglang.quantization import CpuFp8Config, CpuInt4Config, IntegerScheme

PACKAGE = Path(qnext_sglang.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
SGLANG = f"SGLang {version('sglang')}"

# What we call: its first parameters, which we pass by position, and those that we pass by name.
CALLS: dict[str, tuple[list[str], set[str]]] = {
    "layers.linear.ColumnParallelLinear": (["input_size", "output_size"], {"bias", "quant_config", "prefix"}),
    "layers.linear.MergedColumnParallelLinear": (["input_size", "output_sizes"], {"bias", "quant_config", "prefix"}),
    "layers.linear.QKVParallelLinear": (
        ["hidden_size", "head_size", "total_num_heads", "total_num_kv_heads"],
        {"bias", "quant_config", "prefix"},
    ),
    "layers.linear.ReplicatedLinear": (["input_size", "output_size"], {"bias", "quant_config", "prefix"}),
    "layers.linear.RowParallelLinear": (
        ["input_size", "output_size"],
        {"bias", "quant_config", "prefix", "reduce_results"},
    ),
    "layers.rotary_embedding.get_rope": (
        ["head_size"],
        {"rotary_dim", "max_position", "base", "rope_scaling", "partial_rotary_factor", "dtype"},
    ),
    "layers.radix_attention.RadixAttention": (
        ["num_heads", "head_dim", "scaling"],
        {"num_kv_heads", "layer_id", "quant_config", "prefix"},
    ),
    "layers.radix_attention.RadixAttention.forward": (["self", "q", "k", "v", "forward_batch"], set()),
    "layers.radix_linear_attention.RadixLinearAttention": (
        [],
        {"layer_id", "num_q_heads", "num_k_heads", "num_v_heads", "head_q_dim", "head_k_dim", "head_v_dim"},
    ),
    "layers.radix_linear_attention.RadixLinearAttention.forward": (
        ["self", "forward_batch", "mixed_qkv", "a", "b"],
        set(),
    ),
    "layers.moe.fused_moe_triton.layer.FusedMoE": (
        [],
        {
            "num_experts",
            "hidden_size",
            "intermediate_size",
            "layer_id",
            "top_k",
            "quant_config",
            "quant_method",
            "inplace",
            "prefix",
            "routing_method_type",
        },
    ),
    "layers.moe.fused_moe_triton.layer.FusedMoE.forward": (["self", "hidden_states", "topk_output"], set()),
    "layers.moe.fused_moe_triton.layer.FusedMoE.make_expert_params_mapping": (
        ["ckpt_gate_proj_name", "ckpt_down_proj_name", "ckpt_up_proj_name", "num_experts"],
        set(),
    ),
    "layers.moe.fused_moe_triton.layer.FusedMoE.weight_loader": (
        ["self", "param", "loaded_weight", "weight_name"],
        {"shard_id", "expert_id"},
    ),
    "layers.moe.topk.TopK": (["top_k"], {"renormalize", "layer_id"}),
    "layers.moe.topk.TopK.forward_cuda": (["self", "hidden_states", "router_logits"], set()),
    "layers.moe.topk.TopK.bind_runner_backend": (["self", "runner_backend"], {"routing_method_type"}),
    "layers.moe.utils.get_moe_runner_backend": ([], set()),
    "layers.quantization.compressed_tensors.compressed_tensors.CompressedTensorsConfig.from_config": (
        ["config"],
        set(),
    ),
    "layers.quantization.compressed_tensors.schemes.CompressedTensorsWNA16": (
        ["strategy", "num_bits", "group_size"],
        set(),
    ),
    "layers.quantization.compressed_tensors.schemes.CompressedTensorsWNA16.create_weights": (
        [
            "self",
            "layer",
            "output_size",
            "input_size",
            "output_partition_sizes",
            "input_size_per_partition",
            "params_dtype",
            "weight_loader",
        ],
        set(),
    ),
    "layers.quantization.fp8.Fp8MoEMethod": (["quant_config"], set()),
    "layers.quantization.utils.is_layer_skipped": (["prefix", "ignored_layers"], {"fused_mapping"}),
    "layers.moe.topk.StandardTopKOutput": (["topk_weights", "topk_ids", "router_logits"], set()),
    "layers.moe.token_dispatcher.StandardCombineInput": ([], {"hidden_states"}),
    "layers.flashinfer_comm_fusion.flashinfer_allreduce_residual_rmsnorm": (
        ["input_tensor", "residual", "weight", "eps"],
        set(),
    ),
    "layers.layer_boundary.residual.add_norm.flashinfer_ar_fusion_applies": (["batch_size"], set()),
    "runtime_context.get_exec": ([], set()),
    "layers.vocab_parallel_embedding.ParallelLMHead": (
        ["num_embeddings", "embedding_dim"],
        {"quant_config", "org_num_embeddings", "prefix"},
    ),
    "layers.vocab_parallel_embedding.VocabParallelEmbedding": (
        ["num_embeddings", "embedding_dim"],
        {"org_num_embeddings"},
    ),
    "layers.logits_processor.LogitsProcessor": (["config"], set()),
    "layers.logits_processor.LogitsProcessor.forward": (
        ["self", "input_ids", "hidden_states", "lm_head", "logits_metadata"],
        set(),
    ),
    "layers.attention.hybrid_linear_attn_backend.HybridLinearAttnBackend": (
        ["full_attn_backend", "linear_attn_backend", "full_attn_layers"],
        set(),
    ),
    "layers.attention.hybrid_linear_attn_backend.HybridLinearAttnBackend._scatter_speculative_state_with_mask": (
        ["dst", "src", "dst_indices_raw", "step_indices_raw", "src_indices_raw"],
        set(),
    ),
    "layers.attention.hybrid_linear_attn_backend.MambaAttnBackendBase": (["model_runner"], set()),
    "layers.attention.linear.utils.build_verify_intermediate_state_indices": (["pool_size", "device"], set()),
    "layers.attention.attention_registry.register_attention_backend": (["name"], set()),
    "arg_groups.choices.add_attention_backend_choices": (["iterable"], set()),
    "arg_groups.choices.add_deterministic_attention_backend_choices": (["iterable"], set()),
    "arg_groups.choices.add_radix_supported_deterministic_attention_backend_choices": (["iterable"], set()),
    "layers.sampler.sampling_from_probs_torch": (["probs", "sampling_seed", "positions"], set()),
    "configs.mamba_utils.mamba2_state_dtype": (["config"], set()),
    "configs.hybrid_arch.hybrid_gdn_config": (["model_config"], set()),
    "mem_cache.memory_pool.KVWriteLoc": (["loc", "swa_loc"], set()),
    "mem_cache.memory_pool.HybridLinearKVPool.set_kv_buffer": (
        ["self", "layer", "loc_info", "cache_k", "cache_v"],
        set(),
    ),
    "mem_cache.memory_pool.move_kv_cache_native": (["k_buffer", "v_buffer", "tgt_loc", "src_loc"], set()),
    "model_loader.weight_utils.default_weight_loader": (["param", "loaded_weight"], set()),
    "models.registry.import_model_classes": (["package_name"], {"strict"}),
    "plugins.hook_registry.HookRegistry.register": (["target", "hook", "hook_type"], set()),
    "platforms.cuda.CudaSRTPlatform.get_device_capability": (["self"], set()),
    "utils.add_prefix": (["name", "prefix"], set()),
    "utils.get_bool_env_var": (["name"], set()),
    "utils.get_cpu_ids_by_node": ([], set()),
}

# Whose attributes our modules use: what they call such an object, its class, and the modules (all where None).
OBJECTS: list[tuple[str, str, set[str] | None]] = [
    ("server_args", "server_args.ServerArgs", None),
    ("forward_batch", "model_executor.forward_batch_info.ForwardBatch", None),
    ("forward_mode", "model_executor.forward_batch_info.ForwardMode", None),
    ("mode", "model_executor.forward_batch_info.ForwardMode", None),
    ("metadata", "layers.attention.mamba.mamba2_metadata.ForwardMetadata", None),
    ("forward_metadata", "layers.attention.mamba.mamba2_metadata.ForwardMetadata", None),
    ("spec_info", "speculative.eagle_info.EagleDraftInput", None),
    ("runner", "model_executor.model_runner.ModelRunner", None),
    ("factory", "speculative.draft_utils.DraftBackendFactory", None),
    ("pool", "mem_cache.memory_pool.HybridReqToTokenPool", {"gated_delta_net.py"}),
    ("req_to_token_pool", "mem_cache.memory_pool.HybridReqToTokenPool", None),
    ("mamba_pool", "mem_cache.memory_pool.MambaPool", None),
    ("mamba_cache", "mem_cache.memory_pool.MambaPool.SpeculativeState", None),
    ("cache", "mem_cache.memory_pool.MambaPool.SpeculativeState", {"gated_delta_net.py"}),
    ("caches", "mem_cache.memory_pool.MambaPool.SpeculativeState", {"cpu/gated_delta_net.py"}),
    ("token_to_kv_pool", "mem_cache.memory_pool.MHATokenToKVPool", None),
    ("token_to_kv_pool", "mem_cache.memory_pool.HybridLinearKVPool", None),
    ("layer", "layers.radix_attention.RadixAttention", {"cpu/attention.py"}),
    ("layer", "layers.radix_linear_attention.RadixLinearAttention", {"engine.py", "gated_delta_net.py"}),
    ("dispatch_output", "layers.moe.token_dispatcher.StandardDispatchOutput", None),
    ("moe_runner", "layers.moe.utils.MoeRunnerBackend", None),
    ("quant_config", "layers.quantization.fp8.Fp8Config", {"experts.py", "quantization.py"}),
    ("RoutingMethodType", "layers.moe.utils.RoutingMethodType", None),
    ("platform", "platforms.interface.SRTPlatform", {"__init__.py"}),
    ("sampling_info", "sampling.sampling_batch_info.SamplingBatchInfo", None),
    ("info", "sampling.sampling_batch_info.SamplingBatchInfo", {"determinism.py"}),
    ("current_platform", "platforms.interface.SRTPlatform", None),
    ("HookRegistry", "plugins.hook_registry.HookRegistry", None),
    ("HookType", "plugins.hook_registry.HookType", None),
    ("ModelRegistry", "models.registry._ModelRegistry", None),
]
# Attributes of them that are ours.
OURS = {"integers", "is_qnext", "qnext_batch", "qnext_best", "qnext_config", "qnext_core", "qnext_weights"}

# Our classes under SGLang's, and the methods that they add.
CLASSES: dict[type, set[str]] = {
    GatedDeltaNetBackend: {"_run", "_recurrent_batch", "track"},
    gated_delta_net.CpuGatedDeltaNetBackend: set(),
    gated_delta_net.CpuHybridBackend: set(),
    platform.CpuPlatform: set(),
    attention.CpuKVPool: set(),
    attention.CpuAttentionBackend: {"_attend"},
    QnextMoEMethod: set(),
    QnextFp8MoEMethod: set(),
    QnextInt4MoEMethod: set(),
    SharedFp8LinearMethod: set(),
    QnextFp8LinearMethod: set(),
    QnextInt4LinearMethod: set(),
    QnextInt8LinearMethod: set(),
    CpuFp8Config: set(),
    CpuInt4Config: {"read_names"},
    IntegerScheme: set(),
    QnextFusedMoE: {"_route"},
}
# Overridden methods whose arguments are ours to choose, because we call them ourselves.
OWN_ARGUMENTS = {"QnextFusedMoE.forward"}

ALL_HOOKS = hooks.HOOKS + determinism.HOOKS + cpu_hooks.HOOKS

# Environment variables of SGLang that we read or set, and who reads them there.
VARIABLES = {
    MODELS_VARIABLE: "models.registry",
    defaults.THREADS_BIND: "utils.numa_utils",
    "SGLANG_MAMBA_CONV_DTYPE": "configs.mamba_utils",
    "SGLANG_USE_AITER": "layers.moe.token_dispatcher.standard",
    "SGLANG_USE_CPU_ENGINE": "platforms",
}


def resolve(path: str) -> Any:
    """Import a dotted path whose tail may be attributes."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as error:
        raise AssertionError(f"{SGLANG} has no {path}: {error}") from error


def imported_symbols() -> list[str]:
    """Every ``sglang…`` name that a module of the plugin imports."""
    symbols = set()
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang":
                symbols |= {f"{node.module}.{alias.name}" for alias in node.names}
    return sorted(symbols)


def used_attributes(name: str, modules: set[str] | None) -> set[str]:
    """Attributes that our modules read or write of whatever they call ``name``."""
    used = set()
    for module, tree in SOURCES.items():
        for node in ast.walk(tree) if modules is None or module in modules else ():
            if isinstance(node, ast.Attribute):
                owner = node.value
                called = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", None)
                used |= {node.attr} if called == name else set()
    return used - OURS


@cache
def attributes_of(kind: type) -> set[str]:
    """Attributes that an instance of ``kind`` has: those of its classes, and all that their methods assign."""
    found = set(getattr(kind, "__struct_fields__", ()))
    for base in kind.__mro__:
        found |= set(vars(base)) | set(getattr(base, "__annotations__", {}))
        if base.__module__.split(".")[0] in ("sglang", "qnext_sglang"):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            found |= {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            }
    return found


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_only_the_named_modules_import_sglang() -> None:
    named = {"__init__.py", "determinism.py", "doctor.py", "hooks.py", "serving.py", "sglang_api.py"}
    named |= {"bench/cuda_peers.py", "cpu/attention.py", "cpu/defaults.py", "cpu/hooks.py", "cpu/platform.py"}
    importing = {
        module
        for module, tree in SOURCES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "sglang" for alias in node.names))
    }
    assert importing == named


@pytest.mark.parametrize("symbol", imported_symbols())
def test_symbol_exists(symbol: str) -> None:
    module, _, name = symbol.rpartition(".")
    assert hasattr(resolve(module), name), f"{SGLANG} has no {symbol}"


@pytest.mark.parametrize("symbol", CALLS)
def test_symbol_takes_our_arguments(symbol: str) -> None:
    positional, named = CALLS[symbol]
    theirs = parameters(resolve(f"sglang.srt.{symbol}"))
    assert theirs[: len(positional)] == positional, f"{SGLANG}: {symbol} takes {theirs}"
    missing = named - set(theirs[len(positional) :])
    assert not missing, f"{SGLANG}: {symbol} no longer takes {sorted(missing)}"


@pytest.mark.parametrize(("name", "kind", "modules"), OBJECTS, ids=[f"{name}-{kind}" for name, kind, _ in OBJECTS])
def test_object_has_the_attributes_that_we_use(name: str, kind: str, modules: set[str] | None) -> None:
    used = used_attributes(name, modules)
    assert used, f"no module uses a {name} any more"
    missing = used - attributes_of(resolve(f"sglang.srt.{kind}"))
    assert not missing, f"{SGLANG}: {kind} lost {sorted(missing)}"


def test_server_args_has_the_fields_that_we_use() -> None:
    fields = set(resolve("sglang.srt.server_args.ServerArgs").__struct_fields__)
    missing = used_attributes("server_args", None) - fields
    assert not missing, f"{SGLANG}: ServerArgs lost {sorted(missing)}"


def test_whether_norms_sum_is_where_sglang_reads_it() -> None:
    own = inspect.getsource(resolve("sglang.srt.layers.layer_boundary.residual.add_norm.flashinfer_ar_fusion_applies"))
    assert "get_exec().comm.flashinfer_allreduce_fusion_backend is not None" in own


def test_its_deterministic_mode_replaces_the_products_and_the_log_softmax_of_a_gpu() -> None:
    runner = resolve("sglang.srt.model_executor.model_runner.ModelRunner")
    assert "enable_batch_invariant_mode()" in inspect.getsource(runner.maybe_enable_batch_invariant_mode)
    mode = inspect.getsource(resolve("sglang.srt.batch_invariant_ops.batch_invariant_ops.enable_batch_invariant_mode"))
    assert all(f'"aten::{name}"' in mode for name in ("mm", "addmm", "_log_softmax"))


def overridden_methods() -> list[tuple[type, str]]:
    return [
        (kind, name)
        for kind, added in CLASSES.items()
        for name, value in vars(kind).items()
        if inspect.isfunction(value) and name not in added and name != "__init__"
    ]


@pytest.mark.parametrize(("kind", "name"), overridden_methods(), ids=lambda value: getattr(value, "__name__", value))
def test_overridden_method_takes_the_arguments_of_the_base(kind: type, name: str) -> None:
    theirs = next((vars(base)[name] for base in kind.__mro__[1:] if name in vars(base)), None)
    assert theirs is not None, f"{SGLANG}: no base of {kind.__name__} has {name} any more"
    ours = inspect.signature(vars(kind)[name]).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in ours.values())
    if not anything and f"{kind.__name__}.{name}" not in OWN_ARGUMENTS:
        # What a method calls its own object is its affair.
        assert list(ours)[1:] == parameters(theirs)[1:], f"{SGLANG}: the arguments of {kind.__name__}.{name} changed"


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_base_class_has_what_ours_uses_of_it(kind: type) -> None:
    read = {
        node.attr
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind))))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    missing = read - attributes_of(kind)
    assert not missing, f"{SGLANG}: the bases of {kind.__name__} lost {sorted(missing)}"


@pytest.mark.parametrize("hook", ALL_HOOKS, ids=lambda hook: hook.target)
def test_hook_takes_the_arguments_of_its_target(hook: hooks.Hook) -> None:
    theirs = resolve(hook.target)
    if inspect.ismethoddescriptor(theirs):
        return  # of torch, in C: has no signature
    ours = parameters(hook.function)
    if hook.around:
        assert ours.pop(0) == "original"
    # What a method calls its own object is its affair.
    first = 1 if isinstance(resolve(hook.target.rpartition(".")[0]), type) else 0
    assert ours[first:] == parameters(theirs)[first:], f"{SGLANG}: the arguments of {hook.target} changed"


def test_every_hook_resolves() -> None:
    assert not hooks.unresolved(ALL_HOOKS), SGLANG


@pytest.mark.parametrize("target", cpu_hooks.NAMES)
def test_name_that_we_set_is_free(target: str) -> None:
    module, _, name = target.rpartition(".")
    assert hasattr(resolve(module), name), f"{SGLANG} has no {target}"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            speculation.tree_speculative_sampling_target_only,
            "sglang.kernels.ops.speculative.sampling.tree_speculative_sampling_target_only",
        ),
        (
            speculation.assign_extend_cache_locs,
            "sglang.kernels.ops.speculative.cache_locs.assign_extend_cache_locs_func",
        ),
    ],
)
def test_function_takes_the_arguments_of_sglangs_own(ours: Any, theirs: str) -> None:
    assert parameters(ours) == parameters(resolve(theirs)), f"{SGLANG}: the arguments of {theirs} changed"


@pytest.mark.parametrize("name", ["top_k_renorm_probs_triton", "top_p_renorm_probs_triton"])
def test_renormalisation_takes_probabilities_and_a_limit(name: str) -> None:
    theirs = resolve(f"sglang.kernels.ops.sampling.renorm_triton.{name}")
    assert len(parameters(theirs)) == 2, f"{SGLANG}: the arguments of {name} changed"


@pytest.mark.parametrize("architecture", serving.IN_TREE)
def test_sglang_has_its_own_model(architecture: str) -> None:
    resolve(f"{serving.IN_TREE[architecture]}.{architecture}")


def test_full_attention_layers_are_in_the_configuration() -> None:
    name = "sglang.srt.configs.qwen3_next.Qwen3NextConfig"
    assert hasattr(resolve(name), "full_attention_layer_ids"), f"{SGLANG}: {name} lost full_attention_layer_ids"


@pytest.mark.parametrize("variable", VARIABLES)
def test_sglang_reads_the_variable(variable: str) -> None:
    reader = VARIABLES[variable]
    assert variable in inspect.getsource(resolve(f"sglang.srt.{reader}")), f"{SGLANG}: {reader} ignores {variable}"


def test_sglang_asks_our_platform_only_for_names_that_it_knows_and_has_its_own_for_a_cpu() -> None:
    own = resolve("sglang.srt.layers.quantization.CPU_QUANTIZATION_METHODS")
    assert set(STORED_IN_INT4) <= set(own)
    assert isinstance(resolve("sglang.srt.layers.quantization.QUANTIZATION_METHODS"), dict)
    method = resolve("sglang.srt.layers.quantization.compressed_tensors.compressed_tensors.CompressedTensorsConfig")
    assert hasattr(method.from_config(describe_int4([], 32)), "config")
