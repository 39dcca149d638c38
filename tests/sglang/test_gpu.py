"""What can be known of a GPU without one: who serves, whose experts run, and what a CUDA graph would capture."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import TopKOutputFormat
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsFusedMoEMethod,
)
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod, UnquantizedLinearMethod
from sglang.srt.layers.radix_linear_attention import RadixLinearAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.platforms.interface import SRTPlatform
from sglang.srt.runtime_context import get_context, get_flags, get_parallel
from sglang.srt.server_args import ServerArgs
from torch import Tensor, nn

import qnext_sglang
from qnext_kernels import experts as our_experts
from qnext_kernels import experts_fp8, force_backend, layouts, rms_norm, topk_softmax, triton_support
from qnext_kernels.dispatch import OPERATIONS, deterministic
from qnext_plugins import gpus
from qnext_plugins.cli.checkpoint.tensors import describe_int4
from qnext_plugins.model import ConfigError, Qwen3NextConfig, RMSNorm, SparseMoe
from qnext_plugins.packed_methods import unpacked_weights
from qnext_sglang import UnsupportedEngineError, determinism, engine, experts, gpu_refusal, serving
from qnext_sglang import sglang_api as api
from qnext_sglang.determinism import DeterminismError
from qnext_sglang.engine import SglangEngine, SummingRMSNorm
from qnext_sglang.gated_delta_net import GatedDeltaNetBackend
from qnext_sglang.loading import load_parameters
from qnext_sglang.models.qwen3_next import Qwen3NextForCausalLM
from tests.checkpoints import random_config
from tests.kernels.fused_moe_stand_in import stand_in
from tests.kernels.triton.ahead_of_time import compiling_for
from tests.kernels.triton.interpreter import interpreted, kernel_modules
from tests.logged import logged
from tests.sglang import recurrent_runs as runs
from tests.sglang.platforms import Gpu, Musa, OldGpu, RocmGpu

CUDA = torch.device("cuda")
PREFIX = "model.layers.0.mlp.experts"
MAX_BATCH = 4
TOLERANCE = 1e-4
"""Of outputs and states of order one in float32, whose sums two kernels take in another order."""


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """What these tests change, operations would remember: which backend serves a GPU."""
    layouts.forget()
    yield
    layouts.forget()


@pytest.fixture(autouse=True)
def configured() -> Iterator[None]:
    """A process that has published its configuration, with SGLang's chunk size for this model."""
    with get_context().override_server_args(_mamba_cache_chunk_size=64):
        yield


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the plugin logs."""
    qnext_sglang.logger.setLevel(logging.INFO)
    experts._say_once.cache_clear()
    with logged(qnext_sglang.logger) as messages:
        yield messages
    qnext_sglang.logger.setLevel(logging.NOTSET)
    experts._say_once.cache_clear()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> ServerArgs:
    """A process on a GPU that our kernels serve, and its configuration."""
    monkeypatch.setattr(gpus, "triton_works", lambda: True)
    monkeypatch.setattr(triton_support, "why_missing", lambda device_type, index: None)
    monkeypatch.setattr(serving, "current_platform", Gpu())
    server_args = ServerArgs(model_path="checkpoint")
    monkeypatch.setattr(experts.api, "get_server_args", lambda: server_args)
    return server_args


@pytest.mark.usefixtures("on_gpu")
class TestRefusal:
    @pytest.mark.parametrize("platform", [Gpu, RocmGpu])
    def test_a_gpu_is_served(self, platform: type[SRTPlatform]) -> None:
        assert gpu_refusal(platform()) is None

    def test_what_is_not_served_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "musa" in (gpu_refusal(Musa()) or "")
        assert gpu_refusal(OldGpu()) == "it needs compute capability 8.0, and this GPU has 7.5"
        monkeypatch.setattr(gpus, "triton_works", lambda: False)
        assert gpu_refusal(Gpu()) == "no Triton works on this machine"

    def test_an_operation_without_a_gpu_kernel_is_named_unless_a_backend_is_forced(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        only_on_cpus = tuple(backend for backend in OPERATIONS["moe"].backends if backend.devices != ("cuda",))
        monkeypatch.setattr(OPERATIONS["moe"], "backends", only_on_cpus)
        assert gpu_refusal(Gpu()) == "it has no GPU kernels for moe (QNEXT_BACKEND=reference tries it, slowly)"
        monkeypatch.setenv("QNEXT_BACKEND", "reference")
        assert gpu_refusal(Gpu()) is None

    def test_the_deterministic_mode_is_served_beside_that_of_sglang(self) -> None:
        server_args = ServerArgs(model_path="checkpoint", enable_deterministic_inference=True)
        with deterministic():
            assert gpu_refusal(Gpu()) is None
            assert serving.unserved_flags(server_args) is None
            assert not determinism.obstacles(server_args, None, None)
            with pytest.raises(DeterminismError) as raised:
                determinism.prepare(ServerArgs(model_path="checkpoint"), None, None)
        assert str(raised.value) == (
            "qnext-plugins: on a GPU the deterministic mode needs SGLang's own with it, "
            "which --enable-deterministic-inference turns on"
        )

    def test_the_deterministic_mode_refuses_by_name_what_neither_side_keeps(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server_args = ServerArgs(model_path="checkpoint", kv_cache_dtype="fp8_e5m2", bf16_gemm_backend="gemv")
        config = Fp8Config(True, weight_block_size=[128, 128])
        assert determinism.obstacles(server_args, None, config) == [
            "quantized weights",
            "--kv-cache-dtype fp8_e5m2",
            "--bf16-gemm-backend gemv",
        ]
        monkeypatch.setattr(experts.api, "get_moe_runner_backend", lambda: MoeRunnerBackend.FLASHINFER_TRTLLM)
        assert determinism.obstacles(ServerArgs(model_path="checkpoint"), None, None) == [
            "SGLang's own experts (--moe-runner-backend is flashinfer_trtllm)"
        ]


@pytest.mark.usefixtures("on_gpu")
def test_the_line_names_only_what_ours_serve_there(lines: list[str]) -> None:
    serving.announce("Qwen3NextForCausalLM", torch.bfloat16)
    (line,) = lines
    assert "gated_delta_rule=" in line
    assert "moe=triton" in line
    assert "linear=" not in line
    assert "paged_attention=" not in line


def test_no_triton_works_without_a_gpu() -> None:
    assert gpus.triton_works() == torch.cuda.is_available()


@pytest.mark.usefixtures("on_gpu")
class TestExperts:
    @staticmethod
    def method(quant_config: Fp8Config | None = None, middle: int = 128) -> Any:
        return experts.our_method(quant_config, PREFIX, middle, CUDA, torch.bfloat16)

    def test_unquantized_ones_are_ours(self, lines: list[str]) -> None:
        assert type(self.method()) is experts.QnextMoEMethod
        assert not lines

    def test_block_wise_fp8_is_ours_where_a_rank_has_whole_blocks(self, lines: list[str]) -> None:
        config = Fp8Config(True, weight_block_size=[128, 128])
        assert type(self.method(config)) is experts.QnextFp8MoEMethod
        assert not lines
        assert self.method(config, middle=64) is None
        assert self.method(config, middle=64) is None
        (line,) = lines
        assert line.startswith("qnext-plugins leaves SGLang's own experts in place: ")
        assert line.endswith("a rank's 64 columns of them are not whole blocks of FP8")

    def test_those_that_a_quantized_checkpoint_leaves_out_are_unquantized(self) -> None:
        config = Fp8Config(True, weight_block_size=[128, 128], ignored_layers=[PREFIX])
        assert type(self.method(config)) is experts.QnextMoEMethod

    def test_other_quantization_stays_sglangs_own_and_strict_makes_it_an_error(
        self, lines: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.method(Fp8Config(True)) is None
        assert lines == ["qnext-plugins leaves SGLang's own experts in place: their weights are quantized (fp8)"]
        experts._say_once.cache_clear()
        monkeypatch.setenv("QNEXT_STRICT", "1")
        with pytest.raises(UnsupportedEngineError, match="quantized"):
            self.method(Fp8Config(True))

    def test_what_only_sglangs_experts_do_keeps_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def obstacle() -> str:
            return experts.obstacle(None, 128, CUDA, torch.bfloat16) or ""

        with monkeypatch.context() as patch:
            patch.setattr(experts.api, "get_moe_runner_backend", lambda: MoeRunnerBackend.FLASHINFER_TRTLLM)
            assert obstacle() == "--moe-runner-backend is flashinfer_trtllm"
        with monkeypatch.context() as patch:
            patch.setenv("SGLANG_USE_AITER", "1")
            assert "AITER" in obstacle()
        for field, value in (("kt_weight_path", "weights"), ("enable_paged_experts", True)):
            with monkeypatch.context() as patch:
                patch.setattr(experts.api, "get_server_args", lambda f=field, v=value: args_with(f, v))
                assert field.replace("_", "-") in obstacle()
        monkeypatch.setattr(triton_support, "why_missing", lambda device_type, index: "no")
        layouts.forget()
        assert obstacle() == "only the reference serves them in torch.bfloat16"


class TestExpertsLayer:
    """SGLang's real layer of experts, of one rank, on a CPU, built as on a GPU."""

    @pytest.fixture(autouse=True)
    def one_rank(self, on_gpu: ServerArgs) -> Iterator[None]:
        with get_parallel().override(tp_rank=0, moe_ep_rank=0, moe_tp_rank=0):
            yield

    @staticmethod
    def build(quant_config: Any = None) -> experts.QnextFusedMoE:
        config = Qwen3NextConfig.from_hf(random_config(hidden_size=128, moe_intermediate_size=128, num_experts=4))
        return experts.QnextFusedMoE(config, None, reduce=True, layer_id=0, quant_config=quant_config, prefix=PREFIX)

    def test_in_a_checkpoint_of_compressed_tensors_sglang_knows_what_is_targeted(self) -> None:
        layer = self.build(CompressedTensorsConfig.from_config(describe_int4([], 32)))
        assert type(layer.quant_method) is CompressedTensorsFusedMoEMethod
        assert layer.w13_weight_packed.dtype == torch.int32

    @pytest.mark.parametrize(
        ("runner", "output"),
        [
            (MoeRunnerBackend.TRITON, TopKOutputFormat.STANDARD),
            (MoeRunnerBackend.FLASHINFER_TRTLLM, TopKOutputFormat.BYPASSED),
        ],
        ids=lambda value: value.name,
    )
    def test_sglangs_own_get_their_tokens_from_sglangs_router(
        self, runner: MoeRunnerBackend, output: TopKOutputFormat, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(get_flags().moe, "runner_backend", runner)
        layer = self.build()
        assert type(layer.quant_method) is UnquantizedFusedMoEMethod
        assert layer.sglangs_topk is not None
        assert layer.sglangs_topk.topk_config.output_format is output

    @staticmethod
    def block(quant_config: Fp8Config | None, **sizes: int) -> SparseMoe:
        """A block of the model, of SGLang's parts."""
        found = {"hidden_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128} | sizes
        hf_config = random_config(num_experts=4, **found)
        engine = SglangEngine(hf_config, quant_config)
        return SparseMoe(Qwen3NextConfig.from_hf(hf_config), engine, prefix="model.layers.0.mlp")

    @pytest.mark.parametrize("quantized", [False, True], ids=["float32", "fp8"])
    def test_ours_run_what_sglang_has_loaded_and_loads_again(self, quantized: bool) -> None:
        block = self.block(Fp8Config(True, weight_block_size=[128, 128]) if quantized else None)
        layer = block.experts
        assert layer.sglangs_topk is None
        assert layer.runner_backend is None, "SGLang then hands on the indices of this rank's experts"
        assert layer.shared_expert == (block.shared_expert,)
        model = nn.ModuleDict({"layer": nn.ModuleDict({"mlp": block})})
        random = torch.Generator().manual_seed(1)
        for _ in range(2):
            checkpoint = random_block(random, layer.num_experts, quantized)
            with unpacked_weights(model):
                load_parameters(model, checkpoint.items(), layer.num_experts)
            x, logits = torch.randn(5, 128, generator=random), torch.randn(5, 4, generator=random)
            with force_backend("moe=reference"):
                routed = topk_softmax(logits, layer.top_k, True)
                weights, shared = arguments_of(checkpoint, layer.num_experts, quantized)
                expected = (experts_fp8 if quantized else our_experts)(x, *weights, *routed, shared=shared)
            with interpreted(*kernel_modules()), force_backend("moe=triton"):
                for module in block.modules():
                    if (method := getattr(module, "quant_method", None)) is not None:
                        method.process_weights_after_loading(module)
                batch = StandardDispatchOutput(x, None, layer._route(x, logits))
                out = layer.quant_method.apply(layer, batch).hidden_states
            # A sum in another order may round one of an expert's 128 activations to the next e4m3, 2⁻³ away.
            tolerance = 2**-3 / 128**0.5 if quantized else TOLERANCE
            assert (out - expected).norm() <= tolerance * expected.norm()

    @pytest.mark.parametrize("quantized", [False, True], ids=["bfloat16", "fp8"])
    def test_flashinfers_are_laid_out_for_it_once_they_are_loaded_and_load_again(
        self, quantized: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stand_in(monkeypatch)
        random = torch.Generator().manual_seed(2)
        with force_backend("moe=flashinfer"):
            with default_dtype(torch.bfloat16):
                block = self.block(Fp8Config(True, weight_block_size=[128, 128]) if quantized else None)
            layer = block.experts
            assert layer.shared_expert == (None,), "it is an MLP of its own"
            model = nn.ModuleDict({"layer": nn.ModuleDict({"mlp": block})})
            for _ in range(2):
                checkpoint = random_block(random, layer.num_experts, quantized)
                if not quantized:
                    checkpoint = {name: weight.bfloat16() for name, weight in checkpoint.items()}
                with unpacked_weights(model):
                    load_parameters(model, checkpoint.items(), layer.num_experts)
                layer.quant_method.process_weights_after_loading(layer)
                assert layer.packed
                weights, _ = arguments_of(checkpoint, layer.num_experts, quantized)
                x = torch.randn(5, 128, generator=random).bfloat16()
                with force_backend("moe=reference"):
                    routed = topk_softmax(torch.randn(5, 4, generator=random), layer.top_k, True)
                    expected = (experts_fp8 if quantized else our_experts)(x, *weights, *routed)
                batch = StandardDispatchOutput(x, None, api.StandardTopKOutput(*routed, x))
                assert torch.equal(layer.quant_method.apply(layer, batch).hidden_states, expected)

    def test_shared_expert_of_another_size_or_stored_otherwise_is_an_mlp_of_its_own(self) -> None:
        shared = f"{PREFIX.removesuffix('experts')}shared_expert"
        ignored = [f"{shared}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
        config = Fp8Config(True, weight_block_size=[128, 128], ignored_layers=ignored)
        config.packed_modules_mapping = Qwen3NextForCausalLM.packed_modules_mapping
        for block in (self.block(None, shared_expert_intermediate_size=256), self.block(config)):
            assert block.experts.shared_expert == (None,)
            assert isinstance(block.shared_expert.down_proj.quant_method, UnquantizedLinearMethod)

    @pytest.mark.parametrize("quantized", [False, True], ids=["float32", "fp8"])
    def test_on_a_cpu_the_shared_one_of_any_size_is_packed_and_computed_along_and_loads_again(
        self, quantized: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(serving, "device", lambda: torch.device("cpu"))
        config = Fp8Config(True, weight_block_size=[128, 128]) if quantized else None
        block = self.block(config, shared_expert_intermediate_size=256)
        layer = block.experts
        assert layer.shared_expert == (block.shared_expert,)
        model = nn.ModuleDict({"layer": nn.ModuleDict({"mlp": block})})
        random = torch.Generator().manual_seed(3)
        for _ in range(2):
            checkpoint = random_block(random, layer.num_experts, quantized, shared_size=256)
            with unpacked_weights(model):
                load_parameters(model, checkpoint.items(), layer.num_experts)
            for module in block.modules():
                if (method := getattr(module, "quant_method", None)) is not None:
                    method.process_weights_after_loading(module)
            assert layer.packed
            x, logits = torch.randn(5, 128, generator=random), torch.randn(5, 4, generator=random)
            with force_backend("moe=reference"):
                routed = topk_softmax(logits, layer.top_k, True)
                weights, shared = arguments_of(checkpoint, layer.num_experts, quantized)
                unrounded = partial(experts_fp8, quantize_activations=False) if quantized else our_experts
                expected = unrounded(x, *weights, *routed, shared=shared)
            out = layer.quant_method.apply(layer, StandardDispatchOutput(x, None, layer._route(x, logits)))
            assert (out.hidden_states - expected).norm() <= TOLERANCE * expected.norm()

    def test_a_linear_whose_parts_are_no_whole_blocks_is_named(self) -> None:
        engine = SglangEngine(random_config(), Fp8Config(True, weight_block_size=[128, 128]))
        with pytest.raises(ConfigError, match=r"^mlp.gate_up_proj on 1 ranks: .* = 192 is not divisible by"):
            engine.gate_up_linear(128, 192, prefix="mlp.gate_up_proj")

    def test_projections_are_joined_and_loaded_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        wholes = torch.randn(96, 64), torch.randn(32, 64)
        names = ["model.linear_attn.in_proj_qkvz.weight", "model.linear_attn.in_proj_ba.weight"]

        def join(quant_config: Fp8Config | None = None) -> Any:
            return SglangEngine(random_config(), quant_config).joined_column_linear(
                64, (96, 32), prefix="in_proj_qkvzba"
            )

        linear = join()
        model = nn.ModuleDict({"model": nn.ModuleDict({"linear_attn": nn.ModuleDict({"in_proj_qkvzba": linear})})})
        load_parameters(model, zip(names, wholes, strict=True), num_experts=0)
        assert torch.equal(linear.weight, torch.cat(wholes))
        assert join(Fp8Config(True, weight_block_size=[128, 128])) is None
        monkeypatch.setattr(serving, "device", lambda: torch.device("cpu"))
        assert join() is None, "on a CPU one call of ours multiplies with both"

    def test_sums_over_the_ranks_are_left_to_norms_that_sum(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = random_config()
        assert type(SglangEngine(config, None).norm(64, 1e-6)) is RMSNorm
        monkeypatch.setattr(engine, "norms_sum", lambda ranks: True)
        summing = SglangEngine(config, None)
        assert type(summing.norm(64, 1e-6)) is SummingRMSNorm
        linear = summing.row_linear(64, 64, reduce=True, prefix="o_proj")
        assert not linear.reduce_results
        assert summing.linear_weight(linear) is None, "kernels that take it along do not sum"
        x, logits = torch.randn(3, 128), torch.randn(3, 4)
        monkeypatch.setattr(api.FusedMoE, "forward", lambda self, x, topk: x)
        monkeypatch.setattr(api, "tensor_model_parallel_all_reduce", lambda x: 2 * x)
        assert torch.equal(self.build()(x, logits), 2 * x)
        assert torch.equal(self.block(None).experts(x, logits), x)
        config.attention_bias = True
        assert type(SglangEngine(config, None).norm(64, 1e-6)) is RMSNorm, "a bias is added behind the sum"

    def test_sglangs_own_experts_do_not_compute_the_shared_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(get_flags().moe, "runner_backend", MoeRunnerBackend.TRITON)
        config = Fp8Config(True, weight_block_size=[128, 128])
        block = self.block(config)
        assert block.experts.shared_expert == (None,)
        assert type(block.shared_expert.down_proj.quant_method) is Fp8LinearMethod


class TestNormsThatSum:
    """On several ranks; ``summed`` stands for the sum over them, and ``kernel`` for FlashInfer's, which needs a GPU."""

    @pytest.fixture(autouse=True)
    def two_ranks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(api, "tensor_model_parallel_all_reduce", lambda x: 2 * x)

    @pytest.fixture
    def norm(self) -> SummingRMSNorm:
        norm = SummingRMSNorm(64, 1e-6)
        load_parameters(norm, [("weight", torch.randn(64))], num_experts=0)
        return norm

    @pytest.mark.parametrize("declines", [False, True])
    def test_flashinfers_kernel_is_asked_where_sglang_would(
        self, norm: SummingRMSNorm, declines: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x, residual, asked = torch.randn(3, 64), torch.randn(3, 64), []

        def kernel(*arguments: Any) -> tuple[Any, Any]:
            asked.append(arguments)
            return (None, None) if declines else ("normed", "total")

        monkeypatch.setattr(api, "flashinfer_allreduce_residual_rmsnorm", kernel)
        monkeypatch.setattr(api, "flashinfer_ar_fusion_applies", lambda tokens: tokens == 3)
        result = norm(x, residual)
        ((given, added, scale, eps),) = asked
        assert given is x
        assert added is residual
        assert eps == 1e-6
        torch.testing.assert_close(scale, 1 + norm.weight.detach())
        if declines:
            torch.testing.assert_close(result, rms_norm(2 * x, norm.weight, 1e-6, residual))
        else:
            assert result == ("normed", "total")
        norm(x[:2], residual[:2])
        assert len(asked) == 1, "SGLang would not have asked it"

    def test_without_a_residual_nothing_is_to_be_summed(self, norm: SummingRMSNorm) -> None:
        x = torch.randn(3, 64)
        torch.testing.assert_close(norm(x), rms_norm(x, norm.weight, 1e-6))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The dtype of a model that is made."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_block(
    random: torch.Generator, num_experts: int, quantized: bool, shared_size: int = 128
) -> dict[str, Tensor]:
    """Weights of a block as a checkpoint has them, each matrix of its routed experts [128, 128]."""
    checkpoint = {
        "layer.mlp.gate.weight": torch.randn(num_experts, 128, generator=random) * 0.1,
        "layer.mlp.shared_expert_gate.weight": torch.randn(1, 128, generator=random) * 0.1,
    }
    for expert in (*(f"experts.{n}" for n in range(num_experts)), "shared_expert"):
        size = shared_size if expert == "shared_expert" else 128
        for name, shape in (("gate_proj", (size, 128)), ("up_proj", (size, 128)), ("down_proj", (128, size))):
            weight = torch.randn(shape, generator=random) * 0.1
            if quantized:
                blocks = [size // 128 for size in shape]
                scale = torch.rand(blocks, generator=random) * 1e-3 + 1e-4
                checkpoint[f"layer.mlp.{expert}.{name}.weight_scale_inv"] = scale
                spread = scale.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
                weight = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
            checkpoint[f"layer.mlp.{expert}.{name}.weight"] = weight
    return checkpoint


def arguments_of(
    checkpoint: dict[str, Tensor], num_experts: int, quantized: bool
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The routed and the shared expert's weights of a checkpoint as the kernel takes them."""
    kinds = ("weight", "weight_scale_inv") if quantized else ("weight",)

    def of(expert: str) -> list[Tensor]:
        parts = [("gate_proj", "up_proj"), ("down_proj",)]
        return [
            torch.cat([checkpoint[f"layer.mlp.{expert}.{name}.{kind}"] for name in names])
            for names in parts
            for kind in kinds
        ]

    routed = zip(*(of(f"experts.{n}") for n in range(num_experts)), strict=True)
    gate = checkpoint["layer.mlp.shared_expert_gate.weight"][0]
    return [torch.stack(weights) for weights in routed], (*of("shared_expert"), gate)


def args_with(field: str, value: object) -> SimpleNamespace:
    """The configuration with another value in one field."""
    return SimpleNamespace(**{"kt_weight_path": None, "enable_paged_experts": False, field: value})


class OnNoDevice(GatedDeltaNetBackend):
    """On pools, and with metadata, that have shapes but no values, as a GPU's have none for the host."""

    def _run(self, layer: Any, **inputs: Any) -> Tensor:
        real, cache = self.req_to_token_pool, self.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        self.forward_metadata.qnext_batch = dataclasses.replace(
            self.batch, **{name: without_values(segment) for name, segment in vars(self.batch).items()}
        )
        fields = ("conv", "temporal", "intermediate_ssm", "intermediate_conv_window")
        values = {name: getattr(cache, name) for name in fields}
        on_meta = {n: [x.to("meta") for x in v] if isinstance(v, list) else v.to("meta") for n, v in values.items()}
        self.req_to_token_pool = SimpleNamespace(mamba2_layer_cache=lambda layer_id: SimpleNamespace(**on_meta))
        try:
            return super()._run(layer, **inputs)
        finally:
            self.req_to_token_pool = real


def without_values(segment: Any) -> Any:
    if segment is None:
        return None
    return dataclasses.replace(segment, **{n: v.to("meta") for n, v in vars(segment).items() if isinstance(v, Tensor)})


def captured(backend: GatedDeltaNetBackend, mode: ForwardMode) -> Any:
    make = runs.decode_batch if mode.is_decode() else runs.verify_batch
    batch = make([0] * MAX_BATCH)
    backend.init_cuda_graph_state(MAX_BATCH, MAX_BATCH * (1 if mode.is_decode() else runs.DRAFT_TOKENS))
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    return batch


def replayed_with_padding(backend: GatedDeltaNetBackend, mode: ForwardMode) -> Any:
    captured(backend, mode)
    batch = (runs.decode_batch if mode.is_decode() else runs.verify_batch)([3, 1, 6, 6])
    batch.num_padding = 2  # type: ignore[attr-defined]
    backend.init_forward_metadata_out_graph(batch)
    return batch


def prefilled(backend: GatedDeltaNetBackend, mode: ForwardMode) -> Any:
    tracked = runs.Tracked([True, False], [64, 0], [15, 16])
    batch = runs.prefill_batch([2, 5], [70, 3], [0, 64], tracked)
    backend.init_forward_metadata(batch)
    return batch


def large_heads(monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    monkeypatch.setattr(runs, "HEAD_DIM", head_dim)
    monkeypatch.setattr(runs, "CHANNELS", (2 * runs.KEY_HEADS + runs.VALUE_HEADS) * head_dim)


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (captured, ForwardMode.DECODE),
        (captured, ForwardMode.TARGET_VERIFY),
        (replayed_with_padding, ForwardMode.DECODE),
        (replayed_with_padding, ForwardMode.TARGET_VERIFY),
        (prefilled, ForwardMode.EXTEND),
    ],
    ids=lambda value: getattr(value, "__name__", getattr(value, "name", None)),
)
def test_a_layer_launches_its_kernels_without_reading_a_tensor(
    make: Callable[..., Any], mode: ForwardMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    large_heads(monkeypatch, 128)
    backend = OnNoDevice(runs.runner())
    batch = make(backend, mode)
    layer, tokens = runs.layer(), len(batch.input_ids)
    layer.qnext_weights = type(layer.qnext_weights)(*(weight.to("meta") for weight in layer.qnext_weights))
    x = runs.inputs(tokens, seed=1)
    with compiling_for("sm_90") as compiled:
        run = backend.forward_decode if mode.is_decode() else backend.forward_extend
        out = run(layer, batch, mixed_qkv=x.qkvz.bfloat16().to("meta"), a=x.ba.bfloat16().to("meta"), b=None)
    assert out.shape == (1, tokens, runs.VALUE_HEADS, runs.HEAD_DIM)
    assert {"gated_delta_net_kernel", "recurrent_kernel"} & {kernel.name for kernel in compiled}


def test_metadata_that_sglang_puts_back_brings_its_batch_along() -> None:
    """SGLang replays the making of metadata as a graph too, and then only sets the object that it made."""
    backend = runs.backend()
    captured(backend, ForwardMode.DECODE)
    kept, batch = backend.forward_metadata, backend.batch
    backend.init_forward_metadata(runs.prefill_batch([2], [5], [0]))
    assert backend.batch.prefill is not None
    backend.forward_metadata = kept
    assert backend.batch is batch


def test_a_prefill_behind_a_graph_gets_its_tokens_without_padding() -> None:
    backend, layer = runs.backend(), real_layer()
    batch, x = runs.prefill_batch([2, 5], [7, 3], [0, 64]), runs.inputs(16, seed=3)
    batch.global_num_token_non_padded_cpu = 10
    backend.init_forward_metadata(batch)
    with forward_context(ForwardContext(attn_backend=runs.hybrid(backend))):
        out = layer(batch, x.qkvz, x.ba, x.ba)
    assert torch.equal(out[0, :10], runs.run(runs.backend(), batch, x[:10]))
    assert not out[0, 10:].any()


def real_layer() -> RadixLinearAttention:
    """SGLang's layer with what ours carries to the backend."""
    layer = RadixLinearAttention(
        layer_id=2,
        num_q_heads=runs.KEY_HEADS,
        num_k_heads=runs.KEY_HEADS,
        num_v_heads=runs.VALUE_HEADS,
        head_q_dim=runs.HEAD_DIM,
        head_k_dim=runs.HEAD_DIM,
        head_v_dim=runs.HEAD_DIM,
    )
    layer.qnext_core, layer.qnext_weights = runs.layer().qnext_core, runs.layer().qnext_weights
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: runs.decode_batch([4, 1, 3]),
        lambda: runs.verify_batch([5, 2]),
        lambda: runs.prefill_batch([2, 5], [70, 3], [0, 64], runs.Tracked([True, False], [64, 0], [15, 16])),
    ],
    ids=["decode", "verify", "prefill with a snapshot"],
)
def test_interpreted_kernels_give_outputs_and_states_of_the_native_ones(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    large_heads(monkeypatch, 16)
    native, triton, x = runs.backend(), runs.backend(), runs.inputs(len(make().input_ids), seed=4)
    expected = runs.run(native, make(), x)
    with interpreted(*kernel_modules()), force_backend("triton"):
        out = runs.run(triton, make(), x)
    pairs = [(out, expected), *zip(runs.states(triton), runs.states(native), strict=True)]
    pairs += zip(runs.step_states(triton), runs.step_states(native), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
