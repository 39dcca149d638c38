"""Checkpoints in group-wise int4 on a CPU: the tokens of transformers on what the numbers mean, in every mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.quantization import get_quantization_config
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.runtime_context import get_context, get_parallel
from sglang.srt.server_args import ServerArgs
from torch import Tensor

from qnext_kernels import experts as our_experts
from qnext_kernels import force_backend, topk_softmax
from qnext_kernels.integers import QUANTIZE
from qnext_kernels.quantized import dequantize
from qnext_plugins.cli.checkpoint.tensors import describe_int4
from qnext_plugins.cli.doctor import Status, Subject
from qnext_plugins.model import ConfigError, Qwen3NextConfig, SparseMoe
from qnext_plugins.packed_methods import unpacked_weights
from qnext_sglang import UnsupportedEngineError, experts
from qnext_sglang.cpu.platform import CpuPlatform
from qnext_sglang.determinism import obstacles
from qnext_sglang.doctor import quantization
from qnext_sglang.engine import SglangEngine
from qnext_sglang.linear import QnextInt4LinearMethod
from qnext_sglang.loading import load_parameters
from qnext_sglang.models.qwen3_next import Qwen3NextForCausalLM
from qnext_sglang.quantization import CpuInt4Config, expect_served
from tests.checkpoints import IN_INT8, NOT_QUANTIZED, random_config, store_as_gptq, write_int4_checkpoint
from tests.sglang.engines import engine
from tests.sglang.quantized import Checkpoints

UPDATED = [
    "model.layers.0.linear_attn.in_proj_qkvz.weight_packed",
    "model.layers.0.linear_attn.out_proj.weight_scale",
    "model.layers.3.self_attn.v_proj.weight_packed",
    "model.layers.3.self_attn.k_proj.weight_scale",
    "model.layers.1.mlp.experts.5.up_proj.weight_packed",
    "model.layers.1.mlp.experts.5.down_proj.weight_scale",
    "model.layers.2.mlp.shared_expert.down_proj.weight_packed",
    "model.layers.2.mlp.shared_expert.gate_proj.weight_scale",
]
"""Of one linear of each kind, merged with others or not, and of experts."""
PUBLISHED = ("re:.*linear_attn.*", r"re:.*\.shared_expert\..*", "re:mtp.*")
"""What published checkpoints leave out, beside what is in int4 nowhere."""
GATE_UP = ("gate_proj", "up_proj")
TWO_RANKS = {f"{group}tp_size": 2 for group in ("", "attn_", "moe_")} | {
    f"{group}tp_rank": 1 for group in ("", "attn_", "moe_")
}
"""As the second of them knows them."""


def made(folder: Path, group: int, ignore: tuple[str, ...] = (), in_int8: tuple[str, ...] = ()) -> Checkpoints:
    write_int4_checkpoint(folder / "int4", folder / "float32", group, ignore=ignore, in_int8=in_int8)
    return Checkpoints(folder / "int4", folder / "float32")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return made(tmp_path_factory.mktemp("int4"), group=32)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return made(tmp_path_factory.mktemp("mixed"), group=128, ignore=PUBLISHED, in_int8=("re:.*self_attn.*",))


@pytest.mark.sglang
def test_tokens_equal_transformers_batched_alone_and_cached_and_follow_the_weights(
    checkpoints: Checkpoints, capfd: pytest.CaptureFixture[str]
) -> None:
    with engine(checkpoints.quantized, log_level="info") as running:
        checkpoints.expect_tokens_of_transformers(running)
        assert "4 decoder layers are one call" in "".join(capfd.readouterr())
        checkpoints.expect_answers_follow(running, UPDATED)


@pytest.mark.sglang
def test_what_a_checkpoint_leaves_out_runs_beside_what_is_quantized(
    mixed: Checkpoints, capfd: pytest.CaptureFixture[str]
) -> None:
    updated = [
        "model.layers.3.self_attn.k_proj.weight_scale",
        "model.layers.1.mlp.experts.2.up_proj.weight_packed",
        "model.layers.2.mlp.shared_expert.down_proj.weight",
        "model.layers.0.linear_attn.in_proj_qkvz.weight",
    ]
    with engine(mixed.quantized, log_level="info") as running:
        mixed.expect_tokens_of_transformers(running)
        assert "4 decoder layers are one call" in "".join(capfd.readouterr())
        mixed.expect_answers_follow(running, updated)


@pytest.mark.sglang
@pytest.mark.parametrize("method", ["gptq", "auto-round"])
def test_int4_of_gptq_and_autoround_with_int8_beside_it_gives_the_tokens_of_transformers_with_drafts_and_is_updated(
    tmp_path: Path, method: str
) -> None:
    """That of GPTQ does not say what is not quantized."""
    checkpoints = made(tmp_path, 64, NOT_QUANTIZED, IN_INT8)
    path = store_as_gptq(checkpoints.quantized, tmp_path / method, method, tells=method == "auto-round")
    stored = checkpoints._replace(quantized=path)
    with engine(path, drafts=3) as running:
        stored.expect_tokens_of_transformers(running)
        updated = [
            "model.layers.3.self_attn.k_proj.scales",
            "model.layers.0.linear_attn.in_proj_qkvz.qweight",
            "model.layers.1.mlp.experts.2.up_proj.qweight",
            "model.layers.2.mlp.shared_expert.down_proj.qweight",
        ]
        stored.expect_answers_follow(running, updated)


@pytest.mark.sglang
@pytest.mark.parametrize(("kind", "ep_size"), [("checkpoints", 1), ("mixed", 2)])
def test_drafts_on_two_ranks_equal_transformers_cold_and_warm(
    kind: str, ep_size: int, request: pytest.FixtureRequest
) -> None:
    checkpoints: Checkpoints = request.getfixturevalue(kind)
    prompts = checkpoints.prompts
    with engine(checkpoints.quantized, drafts=3, tp_size=2, ep_size=ep_size) as running:
        assert checkpoints.first_difference(running, prompts) is None
        assert checkpoints.first_difference(running, prompts) is None
        assert running.cached_tokens > 0
    assert 0 < running.drafts.accepted < running.drafts.drafted


@pytest.mark.sglang
def test_in_the_deterministic_mode_an_answer_is_the_same_alone_and_among_others_and_as_close_as_transformers(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QNEXT_DETERMINISTIC", "1")
    with engine(checkpoints.quantized, dtype="bfloat16") as running:
        checkpoints.expect_independent_and_close(running)


def int4(group: int = 32, ignore: tuple[str, ...] = (), in_int8: tuple[str, ...] = (), **weights: Any) -> Any:
    """What SGLang on our platform makes of int4 whose scheme is as given."""
    described = describe_int4(ignore, group, in_int8)
    described["config_groups"]["group_0"]["weights"] |= weights
    made = CpuPlatform().get_quantization_config("compressed-tensors").from_config(described)
    made.packed_modules_mapping = Qwen3NextForCausalLM.packed_modules_mapping
    return made


def test_the_platform_serves_int4_in_float32_too_and_what_else_the_format_has_stays_sglangs() -> None:
    assert get_quantization_config("compressed-tensors") is CpuInt4Config
    assert type(int4()) is CpuInt4Config
    assert set(int4().get_supported_act_dtypes()) == {torch.bfloat16, torch.float32}
    assert type(int4(symmetric=False)) is CompressedTensorsConfig
    assert type(int4(num_bits=8)) is CompressedTensorsConfig
    assert type(int4(in_int8=IN_INT8)) is CpuInt4Config


def test_int4_is_served_in_the_deterministic_mode_too_and_other_schemes_end_the_start_with_their_name() -> None:
    expect_served(int4())
    assert not obstacles(ServerArgs(model_path="checkpoint"), None, int4())
    with pytest.raises(UnsupportedEngineError, match=r"quantized \(compressed_tensors: symmetric is False\), and it"):
        expect_served(int4(symmetric=False))


def test_experts_are_ours_and_unquantized_where_they_are_left_out() -> None:
    arguments = ("model.layers.0.mlp.experts", 96, torch.device("cpu"), torch.float32)
    assert type(experts.our_method(int4(), *arguments)) is experts.QnextInt4MoEMethod
    left_out = int4(ignore=(r"re:.*\.mlp\.experts\..*",))
    assert type(experts.our_method(left_out, *arguments)) is experts.QnextMoEMethod


class TestLayers:
    """Made by SGLang, on two ranks of which this is the second."""

    @pytest.fixture(autouse=True)
    def second_rank(self) -> Iterator[None]:
        with get_context().override_server_args(), get_parallel().override(moe_ep_rank=0, **TWO_RANKS):
            yield

    @staticmethod
    def build(quant_config: Any) -> SglangEngine:
        return SglangEngine(random_config(), quant_config)

    def test_those_whose_parts_are_no_whole_groups_are_named(self) -> None:
        engine, found = self.build(int4(64)), "expected whole groups of 64 columns on a rank, got"
        with pytest.raises(ConfigError, match=rf"^o_proj on 2 ranks: weight: {found} 96 columns"):
            engine.row_linear(192, 64, reduce=True, prefix="o_proj")
        config = Qwen3NextConfig.from_hf(random_config(moe_intermediate_size=64))
        with pytest.raises(ValueError, match=rf"^w2 of the experts: {found} 32 columns"):
            engine.experts(config, None, prefix="model.layers.0.mlp.experts")

    def test_a_linear_of_which_a_part_is_left_out_is_named(self) -> None:
        name = "model.layers.3.mlp"
        with pytest.raises(
            ConfigError, match=rf"{name}.gate_up_proj: expected .*, got gate_proj 4, up_proj not quantized$"
        ):
            self.build(int4(ignore=(f"{name}.up_proj",))).gate_up_linear(64, 96, prefix=f"{name}.gate_up_proj")

    def test_a_linear_that_is_left_out_by_the_end_of_its_name_alone_is_quantized(self) -> None:
        engine = self.build(int4(ignore=("o_proj", "re:.*layers.4.*")))
        methods = [
            engine.row_linear(64, 64, reduce=True, prefix=f"model.layers.{n}.self_attn.o_proj").quant_method
            for n in (3, 4)
        ]
        assert type(methods[0]) is QnextInt4LinearMethod
        assert isinstance(methods[1], UnquantizedLinearMethod)

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_linear_runs_what_sglang_has_loaded_and_loads_again(self, dtype: torch.dtype, bits: int) -> None:
        config = int4(32, in_int8=("re:mlp.*",) if bits == 8 else ())
        with set_default_torch_dtype(dtype):
            layer: Any = self.build(config).gate_up_linear(64, 256, prefix="mlp.gate_up_proj")
        model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"gate_up_proj": layer})})
        random = torch.Generator().manual_seed(4)
        for _ in range(2):
            stored, read = random_integers({f"mlp.{name}": (256, 64) for name in GATE_UP}, random, {"mlp": bits})
            with unpacked_weights(model):
                load_parameters(model, stored.items(), 0)
            layer.quant_method.process_weights_after_loading(layer)
            assert layer.packed
            x = torch.randn(3, 64, generator=random).to(dtype)
            expected = x.float() @ torch.cat([weight[128:] for weight in read.values()]).T
            assert (layer(x).float() - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()

    @pytest.mark.parametrize(
        ("ignore", "in_int8"),
        [((), ()), (PUBLISHED, ()), ((), IN_INT8)],
        ids=["all", "but the shared one", "the shared one in int8"],
    )
    def test_experts_run_what_sglang_has_loaded_and_load_again(
        self, ignore: tuple[str, ...], in_int8: tuple[str, ...]
    ) -> None:
        hf_config = random_config(num_experts=4, moe_intermediate_size=128, shared_expert_intermediate_size=64)
        prefix = "model.layers.0.mlp"
        block = SparseMoe(
            Qwen3NextConfig.from_hf(hf_config), SglangEngine(hf_config, int4(32, ignore, in_int8)), prefix=prefix
        )
        layer = block.experts
        assert layer.shared_expert == (block.shared_expert,)
        model = torch.nn.ModuleDict({"layer": torch.nn.ModuleDict({"mlp": block})})
        names = [f"layer.mlp.{name}" for name in ("experts.0", "experts.1", "experts.2", "experts.3", "shared_expert")]
        sizes = [128] * 4 + [64]
        random = torch.Generator().manual_seed(5)
        for _ in range(2):
            shapes = {}
            for name, size in zip(names, sizes, strict=True):
                shapes |= {
                    f"{name}.gate_proj": (size, 64),
                    f"{name}.up_proj": (size, 64),
                    f"{name}.down_proj": (64, size),
                }
            stored, read = random_integers(shapes, random, {".shared_expert.": 8} if in_int8 else {})
            stored["layer.mlp.shared_expert_gate.weight"] = gate = torch.randn(1, 64, generator=random)
            if ignore:
                of_shared = {f"{name}.weight": weight for name, weight in read.items() if ".shared_expert." in name}
                stored = {name: weight for name, weight in stored.items() if ".shared_expert." not in name} | of_shared
            with unpacked_weights(model):
                load_parameters(model, stored.items(), 4)
            for module in block.modules():
                if (method := getattr(module, "quant_method", None)) is not None:
                    method.process_weights_after_loading(module)
            assert layer.packed
            x, logits = torch.randn(5, 64, generator=random), torch.randn(5, 4, generator=random)
            w13 = [
                torch.cat([read[f"{name}.{part}"].chunk(2)[1] for part in ("gate_proj", "up_proj")]) for name in names
            ]
            w2 = [read[f"{name}.down_proj"].chunk(2, dim=1)[1] for name in names]
            with force_backend("moe=reference"):
                routed = topk_softmax(logits, layer.top_k, True)
                shared = (w13[4], w2[4], gate[0])
                expected = our_experts(x, torch.stack(w13[:4]), torch.stack(w2[:4]), *routed, shared=shared)
            out = layer.quant_method.apply(layer, StandardDispatchOutput(x, None, layer._route(x, logits)))
            assert (out.hidden_states - expected).norm() <= 1e-4 * expected.norm()


def random_integers(
    shapes: dict[str, tuple[int, int]], random: torch.Generator, bits: dict[str, int]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of linears in groups of 32 as a checkpoint has them, and what their weights stand for.

    ``bits``: by parts of names, of linears that may be in another number of bits than four.
    """
    stored, read = {}, {}
    for name, shape in shapes.items():
        number = next((number for part, number in bits.items() if part in name), 4)
        numbers, scale = QUANTIZE[number](torch.randn(shape, generator=random).bfloat16(), 32)
        # SGLang does not round scales in float32 by itself.
        stored |= {f"{name}.weight_packed": numbers.view(torch.int32), f"{name}.weight_scale": scale.float()}
        stored[f"{name}.weight_shape"] = torch.tensor(shape)
        read[name] = dequantize(numbers, scale, torch.float32)
    return stored, read


def test_a_missing_scale_is_named_before_anything_is_loaded(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.expect_missing_is_named("mtp.layers.0.self_attn.k_proj.weight_scale", tmp_path)


def test_of_linears_that_are_left_out_the_weight_is_expected(mixed: Checkpoints, tmp_path: Path) -> None:
    mixed.expect_missing_is_named("model.layers.0.linear_attn.out_proj.weight", tmp_path)


@pytest.mark.parametrize("method", ["gptq", "auto-round"])
def test_other_int4_of_gptq_and_autoround_ends_the_start_with_its_reason(method: str) -> None:
    described = {"quant_method": method, "bits": 4, "group_size": 128, "sym": False, "desc_act": False}
    config: Any = CpuPlatform().get_quantization_config(method)
    with pytest.raises(UnsupportedEngineError, match=r"symmetric is False"):
        expect_served(config.from_config(described))


@pytest.mark.parametrize(("bits", "status"), [(4, Status.OK), (8, Status.FAILURE)])
def test_the_doctor_tells_which_int4_is_served(bits: int, status: Status) -> None:
    described = describe_int4((), 64)
    described["config_groups"]["group_0"]["weights"]["num_bits"] = bits
    finding = quantization(Subject(config={"quantization_config": described}))
    assert finding is not None
    assert finding.status is status
