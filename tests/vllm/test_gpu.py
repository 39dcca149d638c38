"""What can be known of a GPU without one: who serves, and that CUDA graphs capture and split where they must."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.pattern_matcher import fwd_only
from torch.func import functional_call
from vllm import platforms, triton_utils
from vllm.compilation.backends import split_graph
from vllm.config import (
    CompilationConfig,
    CompilationMode,
    CUDAGraphMode,
    LoRAConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import parallel_state, tensor_model_parallel_all_reduce
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.model_executor.determinism import batch_invariant
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.mamba.checkpoint import MambaPrefillCheckpointMetadata
from vllm.model_executor.layers.quantization import fp8
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata, GDNAttentionMetadataBuilder

from qnext_kernels import force_backend, layouts, rms_norm, triton_support, without_kernels
from qnext_kernels.dispatch import OPERATIONS, deterministic, is_deterministic
from qnext_kernels.triton_support import TritonBackend
from qnext_plugins.gpus import ENGINES_OWN
from qnext_plugins.model import MLP, CoreWeights, Qwen3NextConfig, RMSNorm
from qnext_vllm import UnsupportedEngineError, determinism, experts, gpu_refusal
from qnext_vllm import vllm_api as api
from qnext_vllm.engine import VllmEngine
from qnext_vllm.gated_delta_net import OPERATOR, GatedDeltaNetState, StateBackend, batch_of, recurrent_batch
from tests.checkpoints import TINY
from tests.kernels.fused_moe_stand_in import stand_in
from tests.kernels.triton.ahead_of_time import compiling_for

DRAFTS, REQUESTS = 2, 4
PREFIX = "model.layers.0.mlp.experts"
CPU = torch.device("cpu")


class Gpu(Platform):
    """vLLM's platform for a GPU of NVIDIA, as far as the plugin asks it."""

    _enum = PlatformEnum.CUDA
    device_name = "cuda"

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(9, 0)


class OldGpu(Gpu):
    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(7, 5)


class RocmGpu(OldGpu):
    """Compute capabilities are NVIDIA's."""

    _enum = PlatformEnum.ROCM


class Tpu(Platform):
    _enum = PlatformEnum.TPU
    device_name = "tpu"


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """What these tests change, operations would remember: which backend serves a GPU."""
    layouts.forget()
    yield
    layouts.forget()


@pytest.fixture
def all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM finds Triton, and every operation has a Triton backend."""
    monkeypatch.setattr(triton_utils, "HAS_TRITON", True)
    for name in set(without_kernels("cuda")) - set(ENGINES_OWN):
        monkeypatch.setattr(OPERATIONS[name], "backends", (TritonBackend(), *OPERATIONS[name].backends))


@pytest.mark.usefixtures("all_kernels")
@pytest.mark.parametrize("platform", [Gpu, RocmGpu])
def test_a_gpu_is_served(platform: type[Platform]) -> None:
    assert gpu_refusal(platform()) is None


@pytest.mark.usefixtures("all_kernels")
def test_what_is_not_served_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tpu" in (gpu_refusal(Tpu()) or "")
    assert gpu_refusal(OldGpu()) == "it needs compute capability 8.0, and this GPU has 7.5"
    monkeypatch.setattr(triton_utils, "HAS_TRITON", False)
    assert gpu_refusal(Gpu()) == "vLLM finds no Triton that works on this machine"


@pytest.mark.usefixtures("all_kernels")
def test_the_deterministic_mode_is_served_beside_that_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    with deterministic():
        assert gpu_refusal(Gpu()) == (
            "on a GPU the deterministic mode needs vLLM's own with it, which VLLM_BATCH_INVARIANT=1 turns on"
        )
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
        assert gpu_refusal(Gpu()) is None


def test_vllms_own_mode_turns_ours_on_and_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "_current_platform", Gpu())
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    original = batch_invariant.enable_batch_invariant_mode
    with deterministic(False):
        determinism.turn_on_where_asked()
        assert is_deterministic()
    assert batch_invariant.enable_batch_invariant_mode is original
    assert StateBackend.supports_batch_invariance()


@pytest.mark.usefixtures("all_kernels")
def test_an_operation_without_a_gpu_kernel_is_named_unless_a_backend_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    only_on_cpus = tuple(backend for backend in OPERATIONS["moe"].backends if backend.devices != ("cuda",))
    monkeypatch.setattr(OPERATIONS["moe"], "backends", only_on_cpus)
    assert gpu_refusal(Gpu()) == "it has no GPU kernels for moe (QNEXT_BACKEND=reference tries it, slowly)"
    monkeypatch.setenv("QNEXT_BACKEND", "reference")
    assert gpu_refusal(Gpu()) is None


def vllm_config(**options: Any) -> VllmConfig:
    """A real configuration, of the tiny checkpoint."""
    return EngineArgs(
        str(TINY), dtype="bfloat16", max_model_len=128, max_num_seqs=8, enable_prefix_caching=False, **options
    ).create_engine_config()


@pytest.fixture(params=[0, DRAFTS])
def config(request: pytest.FixtureRequest) -> VllmConfig:
    """With and without speculation, and with full and piecewise CUDA graphs."""
    speculation = {"method": "qwen3_next_mtp", "num_speculative_tokens": request.param} if request.param else None
    found = vllm_config(speculative_config=speculation)
    compilation = CompilationConfig(mode=CompilationMode.VLLM_COMPILE)
    compilation.set_splitting_ops_for_v1(all2all_backend="allgather_reducescatter")
    compilation.cudagraph_mode, compilation.max_cudagraph_capture_size = CUDAGraphMode.FULL_AND_PIECEWISE, 16
    found.compilation_config = compilation
    return found


@pytest.fixture
def layer(config: VllmConfig) -> GatedDeltaNetState:
    """The states of one layer, on no device."""
    qwen = Qwen3NextConfig.from_hf(config.model_config.hf_text_config)
    return GatedDeltaNetState(qwen, config, prefix="model.layers.0.linear_attn")


@pytest.fixture
def builder(config: VllmConfig, layer: GatedDeltaNetState) -> GDNAttentionMetadataBuilder:
    return GDNAttentionMetadataBuilder(layer.get_kv_cache_spec(config), [layer.prefix], config, CPU)


def batch(
    lengths: list[int], contexts: list[int], blocks: Tensor, prefilling: tuple[int, ...] = ()
) -> CommonAttentionMetadata:
    """vLLM's description of a batch: new and known tokens of each request, its blocks of states, who is prefilling."""
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    known = torch.tensor(lengths) + torch.tensor(contexts)
    return CommonAttentionMetadata(
        query_start_loc=offsets,
        query_start_loc_cpu=offsets.clone(),
        seq_lens=known.int(),
        seq_lens_cpu_upper_bound=known.int(),
        num_reqs=len(lengths),
        num_actual_tokens=int(offsets[-1]),
        max_query_len=max(lengths),
        max_seq_len=int(known.max()),
        block_table_tensor=blocks,
        slot_mapping=torch.empty(0, dtype=torch.int64),
        is_prefilling=torch.tensor([n in prefilling for n in range(len(lengths))]),
    )


def captured(builder: GDNAttentionMetadataBuilder) -> GDNAttentionMetadata:
    """What vLLM captures a graph for four requests with."""
    blocks = torch.zeros(REQUESTS, builder.num_spec + 1, dtype=torch.int32)
    length = builder.num_spec + 1
    return builder.build_for_cudagraph_capture(batch([length] * REQUESTS, [0] * REQUESTS, blocks))


def step_of_two(builder: GDNAttentionMetadataBuilder) -> GDNAttentionMetadata:
    """A step of two requests, padded to the four of the graph."""
    columns = builder.num_spec + 1
    blocks = torch.zeros(REQUESTS, columns, dtype=torch.int32)
    blocks[:2] = torch.arange(1, 2 * columns + 1, dtype=torch.int32).view(2, columns)
    common = batch([columns, columns, 0, 0], [30, 40, 0, 0], blocks)
    if not builder.num_spec:
        return builder.build(0, common)
    accepted, drafts = torch.tensor([1, 3, 1, 1]).int(), torch.tensor([DRAFTS, DRAFTS, -1, -1]).int()
    return builder.build(0, common, accepted, drafts)


def test_a_replay_translates_what_the_next_step_wrote(builder: GDNAttentionMetadataBuilder) -> None:
    graph = captured(builder)
    step_of_two(builder)
    replayed = recurrent_batch(graph)
    if not builder.num_spec:
        assert replayed.decode is not None
        assert replayed.decode.slots.tolist() == [1, 2, -1, -1]
        return
    assert replayed.verify is not None
    assert replayed.verify.slots.tolist() == [[1, 2, 3], [4, 5, 6], [-1] * 3, [-1] * 3]
    assert replayed.verify.query_start_loc.tolist() == [0, 3, 6, 6, 6]
    assert replayed.verify.num_accepted_tokens.tolist() == [1, 3, 1, 1]


def test_a_forward_pass_translates_once_and_the_next_one_anew(
    builder: GDNAttentionMetadataBuilder, config: VllmConfig
) -> None:
    metadata = captured(builder)
    found = []
    for _ in range(2):
        with set_forward_context({"a layer": metadata}, config):
            found.append(batch_of(get_forward_context(), metadata))
            assert batch_of(get_forward_context(), metadata) is found[-1]
    assert found[0] is not found[1]


class Between(nn.Module):
    """Something for a graph on either side of the core."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, qkvz: Tensor, ba: Tensor, weights: CoreWeights) -> Tensor:
        return self.core(qkvz * 2, ba, weights) + 1


def inputs(layer: GatedDeltaNetState, tokens: int, device: str) -> tuple[Tensor, Tensor, CoreWeights]:
    """Arguments of a layer."""
    (_, channels), (value_heads, value_dim, _) = layer.get_state_shape()
    qkvz = torch.empty(tokens, channels + value_heads * value_dim, dtype=torch.bfloat16, device=device)
    ba = torch.empty(tokens, 2 * value_heads, dtype=torch.bfloat16, device=device)
    weight = torch.empty(channels, 4, dtype=torch.bfloat16, device=device)
    A_log, dt_bias = torch.empty(2, value_heads, device=device)
    norm = torch.empty(value_dim, dtype=torch.bfloat16, device=device)
    return qkvz, ba, CoreWeights(weight, A_log, dt_bias, norm)


def test_graphs_split_at_the_core_and_own_the_memory_that_it_writes(
    config: VllmConfig, layer: GatedDeltaNetState
) -> None:
    splitting = config.compilation_config.splitting_ops
    assert splitting is not None
    assert OPERATOR in splitting
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    with set_forward_context(None, config):
        torch.compile(Between(layer), backend=keep, fullgraph=True)(*inputs(layer, 3, "cpu"))
    _, pieces = split_graph(graphs[0], splitting)
    assert [piece.is_splitting_graph for piece in pieces] == [False, True, False]
    nodes = list(pieces[1].graph.graph.nodes)
    assert [str(node.target) for node in nodes if node.op == "call_function"] == ["qnext.vllm_gated_delta_net"]
    assert nodes[-1].all_input_nodes == [], "what this piece made would lie elsewhere at every replay of the next one"


def test_a_graph_that_vllm_keeps_whole_is_not_split(config: VllmConfig) -> None:
    config.compilation_config.splitting_ops = []
    qwen = Qwen3NextConfig.from_hf(config.model_config.hf_text_config)
    GatedDeltaNetState(qwen, config, prefix="another")
    assert config.compilation_config.splitting_ops == []


def on_no_device(metadata: Any) -> Any:
    """The same with tensors that cannot be read."""
    values = {field.name: getattr(metadata, field.name) for field in dataclasses.fields(metadata)}
    nested = {n: on_no_device(v) for n, v in values.items() if dataclasses.is_dataclass(v)}
    return dataclasses.replace(
        metadata, **nested, **{n: v.to("meta") for n, v in values.items() if isinstance(v, Tensor)}
    )


def prefill_beside(builder: GDNAttentionMetadataBuilder) -> GDNAttentionMetadata:
    """A prefill of 70 tokens behind a request that decodes, or that verifies."""
    columns = builder.num_spec + 1
    blocks = torch.arange(1, 2 * columns + 1, dtype=torch.int32).view(2, columns)
    common = batch([columns, 70], [30, 0], blocks, prefilling=(1,))
    drafts = torch.tensor([DRAFTS, -1], dtype=torch.int32)
    return builder.build(0, common, torch.ones(2).int(), drafts) if builder.num_spec else builder.build(0, common)


def prefill_past_a_boundary(builder: GDNAttentionMetadataBuilder) -> GDNAttentionMetadata:
    """The same, and vLLM wants the state behind the first 64 tokens of the prefill in block 8."""
    metadata = prefill_beside(builder)
    # With drafts vLLM describes the requests that do not verify alone.
    before = [0] * (0 if builder.num_spec else 1)
    offsets, blocks = torch.tensor([*before, 64]).int(), torch.tensor([*before, 8]).int()
    return dataclasses.replace(metadata, checkpoint=MambaPrefillCheckpointMetadata(offsets, blocks))


def test_the_state_at_a_block_boundary_is_a_snapshot_of_the_prefill(builder: GDNAttentionMetadataBuilder) -> None:
    segment = recurrent_batch(prefill_past_a_boundary(builder)).prefill
    assert segment is not None
    assert segment.snapshot_slots is not None
    assert segment.snapshot_lengths is not None
    assert (segment.snapshot_slots.tolist(), segment.snapshot_lengths.tolist()) == ([8], [64])
    plain = recurrent_batch(prefill_beside(builder)).prefill
    assert plain is not None
    assert plain.snapshot_slots is None


def test_a_prefill_without_a_boundary_beside_one_with_it_has_no_snapshot(builder: GDNAttentionMetadataBuilder) -> None:
    metadata = prefill_past_a_boundary(builder)
    assert metadata.checkpoint is not None
    metadata.checkpoint.state_indices.fill_(api.NULL_BLOCK_ID)
    segment = recurrent_batch(metadata).prefill
    assert segment is not None
    assert segment.snapshot_slots is not None
    assert segment.snapshot_slots.tolist() == [-1]


@pytest.mark.skipif(
    bool({"causal_conv1d", "gated_delta_rule"} & set(without_kernels("cuda"))), reason="an operation has no GPU kernel"
)
@pytest.mark.parametrize("make", [captured, step_of_two, prefill_beside, prefill_past_a_boundary])
def test_a_layer_launches_its_kernels_without_reading_a_tensor(
    make: Any, config: VllmConfig, layer: GatedDeltaNetState, builder: GDNAttentionMetadataBuilder
) -> None:
    metadata = on_no_device(make(builder))
    layer.bind_kv_cache(
        torch.empty(9, 1, 1, layer.get_kv_cache_spec(config).page_size_bytes, dtype=torch.int8, device="meta")
    )
    tokens = int(make(builder).num_actual_tokens)
    qkvz, ba, weights = inputs(layer, tokens, "meta")
    _, (value_heads, value_dim, _) = layer.get_state_shape()
    out = qkvz.new_empty(tokens, value_heads * value_dim)
    with compiling_for("sm_90") as compiled, set_forward_context({layer.prefix: metadata}, config):
        layer.run(batch_of(get_forward_context(), metadata), qkvz, ba, weights, out)
    assert {"gated_delta_net_kernel", "recurrent_kernel"} & {kernel.name for kernel in compiled}


@pytest.fixture
def said_again() -> Iterator[None]:
    """What the experts say once is said in this test, and again behind it."""
    experts._say_once.cache_clear()
    yield
    experts._say_once.cache_clear()


@pytest.fixture
def gpu_config(monkeypatch: pytest.MonkeyPatch, all_kernels: None) -> VllmConfig:
    """A configuration as it is on a GPU that our kernels serve."""
    monkeypatch.setattr(triton_support, "why_missing", lambda device_type, index: None)
    found = vllm_config()
    found.device_config.device = torch.device("cuda")
    return found


@pytest.mark.usefixtures("said_again")
def test_the_experts_are_ours_on_a_gpu(gpu_config: VllmConfig, lines: list[str]) -> None:
    options = experts.experts_options(gpu_config, None, PREFIX)
    assert options["custom_routing_function"] is experts.route
    assert options["routed_experts_cls"] is experts.QnextRoutedExperts
    assert not lines


def test_the_deterministic_mode_serves_this_model_and_the_sampler_stays_vllms(
    gpu_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(determinism, "order_top_log_probs", lambda: pytest.fail("a GPU's sampler is wrapped"))
    with deterministic():
        assert not determinism.obstacles(gpu_config)
        determinism.prepare(gpu_config)


def test_the_deterministic_mode_refuses_by_name_what_neither_side_keeps(
    gpu_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def obstacles(*options: tuple[Any, str, Any]) -> list[str]:
        with monkeypatch.context() as patch:
            for target, name, value in options:
                patch.setattr(target, name, value)
            return determinism.obstacles(gpu_config)

    cache, kernels, model = gpu_config.cache_config, gpu_config.kernel_config, gpu_config.model_config
    assert obstacles((cache, "cache_dtype", "fp8")) == ["--kv-cache-dtype fp8 beside torch.bfloat16"]
    assert obstacles((gpu_config, "lora_config", LoRAConfig())) == ["LoRA adapters"]
    assert obstacles((kernels, "moe_backend", "flashinfer_cutlass")) == [
        "vLLM's own experts (--moe-backend flashinfer_cutlass is asked for)"
    ]
    fp8 = [(model, "quantization", "fp8"), (model.hf_text_config, "moe_intermediate_size", 512)]
    assert obstacles(*fp8, (gpu_config, "quant_config", Fp8Config())) == ["fp8 weights"]
    fp8.append((gpu_config, "quant_config", Fp8Config(weight_block_size=[128, 128])))
    assert obstacles(*fp8) == ["fp8 weights without --linear-backend triton"]
    assert obstacles(*fp8, (kernels, "linear_backend", "triton")) == []


@pytest.fixture
def one_rank(gpu_config: VllmConfig, tmp_path: Path) -> Iterator[None]:
    """A process that makes vLLM's layers."""
    with set_current_vllm_config(gpu_config):
        parallel_state.init_distributed_environment(1, 0, f"file://{tmp_path}/ranks", 0, "gloo")
        parallel_state.initialize_model_parallel()
        yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def shared_expert(vllm_config: VllmConfig) -> MLP:
    """Of vLLM's linears, as the model makes it."""
    engine, prefix = VllmEngine(vllm_config), PREFIX.replace("experts", "shared_expert")
    gate = engine.replicated_linear(128, 1, quantized=False, prefix=f"{prefix}_gate")
    return MLP(128, 128, engine, reduce=False, gate=gate, prefix=prefix)


def of_vllm(vllm_config: VllmConfig, shared: MLP) -> bool:
    """Whether vLLM's runner calls the shared expert; otherwise our experts have it."""
    options = experts.experts_options(vllm_config, shared, PREFIX)
    if "routed_experts_args" in options:
        assert options["routed_experts_args"]["shared_expert"] is shared
        return "shared_experts" in options
    assert options["shared_experts"] is shared
    return True


@pytest.mark.usefixtures("one_rank")
class TestJoinedProjections:
    SIZES = (96, 32)

    def join(self, gpu_config: VllmConfig, sizes: tuple[int, ...] = SIZES) -> Any:
        return VllmEngine(gpu_config).joined_column_linear(16, sizes, prefix="linear_attn.in_proj_qkvzba")

    def test_a_rank_has_its_part_of_each(self, gpu_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        group = parallel_state.get_tp_group()
        monkeypatch.setattr(group, "world_size", 2)
        monkeypatch.setattr(group, "rank_in_group", 1)
        linear = self.join(gpu_config)
        wholes = [torch.randn(size, 16, dtype=linear.weight.dtype) for size in self.SIZES]
        for n, whole in enumerate(wholes):
            linear.weight.weight_loader(linear.weight, whole, n)
        assert torch.equal(linear.weight, torch.cat([whole[len(whole) // 2 :] for whole in wholes]))

    def test_they_stay_apart_where_that_is_better(
        self, gpu_config: VllmConfig, config: VllmConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.join(gpu_config, (96, 24)) is None, "no 16 bytes at once where widths are no multiples of 16"
        assert self.join(config) is None, "on a CPU one call of ours multiplies with both"
        for name, value in {"quant_config": Fp8Config(), "lora_config": LoRAConfig()}.items():
            with monkeypatch.context() as patch:
                patch.setattr(gpu_config, name, value)
                assert self.join(gpu_config) is None


@pytest.mark.usefixtures("one_rank")
class TestNormsBehindSumsOverRanks:
    """vLLM's compiler joins both by their operators, which are here to be those of its own model."""

    @pytest.fixture
    def norm(self, gpu_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> RMSNorm:
        monkeypatch.setattr(gpu_config.compilation_config.pass_config, "fuse_allreduce_rms", True)
        return VllmEngine(gpu_config).norm(128, 1e-6)

    @pytest.mark.parametrize("residuals", [0, 1])
    def test_they_are_the_operators_of_vllms_own_model(
        self, norm: RMSNorm, residuals: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        group = parallel_state.get_tp_group()
        monkeypatch.setattr(group, "world_size", 2)
        monkeypatch.setattr(group, "use_custom_op_call", True)

        def graph(norm: nn.Module) -> str:
            def call(x: Tensor, weight: Tensor, *residual: Tensor) -> Any:
                x = tensor_model_parallel_all_reduce(x)
                result = functional_call(norm, {"weight": weight}, (x, *residual))
                return result if isinstance(result, tuple) else (result, x)

            dtype = torch.bfloat16
            arguments = [torch.empty(size, dtype=dtype, device="meta") for size in ((5, 128), (128,), (5, 128))]
            return str(fwd_only(call, arguments[: 2 + residuals]).graph)

        theirs = graph(GemmaRMSNorm(128, eps=1e-6))
        assert ("vllm_ir.fused_add_rms_norm" if residuals else "vllm_ir.rms_norm") in theirs
        assert "vllm.all_reduce" in theirs
        assert graph(norm) == theirs

    @pytest.mark.parametrize("with_residual", [False, True])
    def test_they_are_the_norm_and_the_sum(self, norm: RMSNorm, with_residual: bool) -> None:
        nn.init.normal_(norm.weight)
        x, residual = torch.randn(2, 5, 128)
        given = residual if with_residual else None
        ours = norm.float()(x, given)
        torch.testing.assert_close(ours, rms_norm(x, norm.weight, 1e-6, given))

    def test_without_several_ranks_to_sum_over_they_are_our_kernel(self, gpu_config: VllmConfig) -> None:
        assert not gpu_config.compilation_config.pass_config.fuse_allreduce_rms
        assert type(VllmEngine(gpu_config).norm(128, 1e-6)) is RMSNorm


@pytest.mark.usefixtures("one_rank")
class TestSharedExpert:
    @pytest.fixture(autouse=True)
    def sizes(self, gpu_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
            monkeypatch.setattr(gpu_config.model_config.hf_text_config, name, 512)
        # vLLM has no linear in FP8 for the CPU that this test runs on.
        monkeypatch.setattr(fp8, "init_fp8_linear_kernel", lambda **options: None)

    @pytest.mark.parametrize("quant_config", [None, Fp8Config(weight_block_size=[128, 128])], ids=["bfloat16", "fp8"])
    def test_our_experts_compute_it_where_a_rank_has_parts_of_one_size(
        self, gpu_config: VllmConfig, quant_config: Fp8Config | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes, parallel = gpu_config.model_config.hf_text_config, gpu_config.parallel_config
        gpu_config.quant_config = quant_config

        def of_vllms() -> bool:
            return of_vllm(gpu_config, shared_expert(gpu_config))

        assert not of_vllms()
        monkeypatch.setattr(parallel, "tensor_parallel_size", 4)
        assert not of_vllms()
        monkeypatch.setattr(parallel, "enable_expert_parallel", True)
        assert of_vllms(), "whole routed experts, a part of the shared one"
        monkeypatch.setattr(parallel, "enable_expert_parallel", False)
        monkeypatch.setattr(sizes, "shared_expert_intermediate_size", 1024)
        assert of_vllms()

    def test_its_weights_in_fp8_are_left_as_they_are_loaded(self, gpu_config: VllmConfig) -> None:
        gpu_config.quant_config = Fp8Config(weight_block_size=[128, 128])
        shared = shared_expert(gpu_config)
        before = {name: parameter.data_ptr() for name, parameter in shared.named_parameters()}
        assert {"gate_up_proj.weight_scale_inv", "down_proj.weight_scale_inv"} <= set(before)
        assert not of_vllm(gpu_config, shared)
        process_weights_after_loading(shared, gpu_config.model_config, CPU)
        assert {name: parameter.data_ptr() for name, parameter in shared.named_parameters()} == before
        assert shared.down_proj.weight.shape == (128, 128)

    @pytest.mark.parametrize("left_out", ["experts", "shared_expert.down_proj"])
    def test_it_stays_vllms_where_one_of_both_is_not_in_fp8(self, gpu_config: VllmConfig, left_out: str) -> None:
        ignored = [PREFIX.replace("experts", left_out)]
        gpu_config.quant_config = Fp8Config(weight_block_size=[128, 128], ignored_layers=ignored)
        shared = shared_expert(gpu_config)
        methods = [type(linear.quant_method) for linear in shared.linears()]
        assert of_vllm(gpu_config, shared)
        assert [type(linear.quant_method) for linear in shared.linears()] == methods

    def test_it_stays_vllms_where_the_experts_are_vllms(
        self, gpu_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shared = shared_expert(gpu_config)
        with monkeypatch.context() as patch:
            patch.setattr(gpu_config, "quant_config", Fp8Config())
            assert of_vllm(gpu_config, shared)
        with monkeypatch.context() as patch:
            patch.setattr(gpu_config.kernel_config, "moe_backend", "flashinfer_cutlass")
            assert of_vllm(gpu_config, shared)
        with monkeypatch.context() as patch, force_backend("moe=flashinfer"):
            stand_in(patch)
            assert of_vllm(gpu_config, shared)

    def test_on_a_cpu_our_experts_compute_it_but_not_under_adapters_or_data_parallelism(
        self, gpu_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gpu_config.device_config.device = CPU
        shared = shared_expert(gpu_config)
        assert not of_vllm(gpu_config, shared)
        with monkeypatch.context() as patch:
            patch.setattr(gpu_config, "lora_config", object())
            assert of_vllm(gpu_config, shared)
        with monkeypatch.context() as patch:
            patch.setattr(gpu_config.parallel_config, "data_parallel_size", 2)
            assert of_vllm(gpu_config, shared)
        with force_backend("moe=cpu"):
            assert of_vllm(gpu_config, shared)


@pytest.mark.usefixtures("said_again")
def test_quantized_experts_stay_vllms_own_with_one_line(
    gpu_config: VllmConfig, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_config.quant_config, gpu_config.model_config.quantization = Fp8Config(), "fp8"
    for _ in range(2):
        assert experts.experts_options(gpu_config, None, PREFIX) == {"shared_experts": None}
    assert lines == ["qnext-plugins leaves vLLM's own experts in place: their weights are quantized (fp8)"]
    monkeypatch.setenv("QNEXT_STRICT", "1")
    experts._say_once.cache_clear()
    with pytest.raises(UnsupportedEngineError, match="quantized"):
        experts.experts_options(gpu_config, None, PREFIX)


def test_experts_in_block_wise_fp8_are_ours_where_a_rank_has_whole_blocks(
    gpu_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_config.quant_config = Fp8Config(weight_block_size=[128, 128])
    monkeypatch.setattr(gpu_config.model_config.hf_text_config, "moe_intermediate_size", 512)
    assert experts.experts_options(gpu_config, None, PREFIX)["routed_experts_cls"] is experts.QnextRoutedExperts
    monkeypatch.setattr(gpu_config.parallel_config, "tensor_parallel_size", 8)
    assert experts.obstacle(gpu_config) == "a rank's 64 columns of them are not whole blocks of FP8"
    monkeypatch.setattr(gpu_config.parallel_config, "enable_expert_parallel", True)
    assert experts.obstacle(gpu_config) is None


def test_what_only_vllms_experts_do_keeps_them(gpu_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gpu_config.kernel_config, "moe_backend", "flashinfer_cutlass")
        assert experts.obstacle(gpu_config) == "--moe-backend flashinfer_cutlass is asked for"
    with monkeypatch.context() as patch:
        patch.setattr(gpu_config.parallel_config, "data_parallel_size", 2)
        assert "data parallelism" in (experts.obstacle(gpu_config) or "")
    with monkeypatch.context() as patch:
        patch.setattr(gpu_config, "lora_config", LoRAConfig())
        assert "LoRA" in (experts.obstacle(gpu_config) or "")
    monkeypatch.setattr(triton_support, "why_missing", lambda device_type, index: "no")
    layouts.forget()
    assert experts.obstacle(gpu_config) == "only the reference serves them in torch.bfloat16"
