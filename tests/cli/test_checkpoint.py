"""``qnext checkpoint``: what it writes is what was asked for, and transformers and the shared draft read it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, CompressedTensorsConfig, FineGrainedFP8Config, Qwen3NextForCausalLM
from typer import Typer
from typer.testing import CliRunner

from qnext_kernels.integers import INT4, INT8
from qnext_kernels.quantized import dequantize
from qnext_plugins.cli.checkpoint import Kind, Spec, Structure, plan, write
from qnext_plugins.cli.checkpoint.command import checkpoint
from qnext_plugins.cli.checkpoint.spec import SLICE, TINY, smallest_hidden_size
from qnext_plugins.cli.checkpoint.tensors import is_quantized, quantize
from qnext_plugins.model import (
    IntegerWeights,
    MultiTokenPredictor,
    Qwen3NextConfig,
    check_files,
    expected_shapes,
    modules_of,
)
from tests.checkpoints import TINY as TRAINED
from tests.model.plain_engine import PlainEngine, stacked
from tests.model.transformers_models import rotary_table

APP = Typer()
APP.command()(checkpoint)


def run(*arguments: object) -> tuple[int, str]:
    """The exit status of ``qnext checkpoint`` and all that it printed."""
    result = CliRunner().invoke(APP, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def written(folder: Path, *arguments: object) -> Path:
    status, output = run(folder, *arguments)
    assert status == 0, output
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def structure_of(folder: Path) -> Structure:
    """The structure that the checkpoint says it was made with, worked out again."""
    made = json.loads((folder / "qnext_checkpoint.json").read_text())
    widths, vocabulary = made["widths"], made["widths"]["vocab_size"]
    silent = set(range(vocabulary)) - spoken(folder)
    return Structure(vocabulary, widths["hidden_size"], sorted(silent), made["mtp_acceptance"], made["seed"])


def spoken(folder: Path) -> set[int]:
    """Tokens whose text is printable and not special, as the tokenizer's own library says."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = {token: tokenizer.decode([token]) for token in range(len(tokenizer))}
    return {
        n
        for n, word in words.items()
        if n not in tokenizer.all_special_ids and word.strip() and word.isascii() and word.isprintable()
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A structured checkpoint in float32, as the command makes it by default."""
    return written(tmp_path_factory.mktemp("tiny") / "checkpoint", "--dtype", "float32", "--mtp-acceptance", 0.7)


@torch.inference_mode()
def successors(folder: Path, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What transformers says after each token of a text."""
    model = Qwen3NextForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model(tokens[None], use_cache=False).logits[0].argmax(dim=1)


def test_transformers_finds_every_tensor_and_none_too_many(tiny: Path) -> None:
    _, loading = Qwen3NextForCausalLM.from_pretrained(tiny, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    assert all(name.startswith("mtp.") for name in loading["unexpected_keys"])


def test_whoever_may_read_the_config_may_read_the_weights(tiny: Path) -> None:
    assert len({file.stat().st_mode for file in tiny.iterdir()}) == 1


def test_the_plugin_finds_every_tensor_of_the_model_and_its_draft(tiny: Path) -> None:
    config = Qwen3NextConfig.from_hf(Qwen3NextForCausalLM.from_pretrained(tiny).config)
    check_files(tiny, expected_shapes(config, target=True, mtp=True))


def test_config_names_the_interval_which_sglang_needs(tiny: Path) -> None:
    config = config_of(tiny)
    assert config["full_attention_interval"] == 4
    assert [n for n, kind in enumerate(config["layer_types"]) if kind == "full_attention"] == [3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_continuation_is_the_successor_of_every_token(dtype: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "checkpoint", "--dtype", dtype, "--seed", 5)
    structure = structure_of(folder)
    text = torch.randperm(structure.vocabulary, generator=torch.Generator().manual_seed(0))
    assert torch.equal(successors(folder, text, getattr(torch, dtype)), structure.successor[text])


def test_greedy_generation_follows_the_cycle(tiny: Path) -> None:
    structure = structure_of(tiny)
    model = Qwen3NextForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    start = structure.cycle[100:105]
    output = model.generate(start[None], attention_mask=torch.ones(1, 5), max_new_tokens=40, do_sample=False)
    assert output[0].tolist() == structure.cycle[100:145].tolist()


def test_the_cycle_says_every_printable_token_once_and_no_other(tiny: Path) -> None:
    structure = structure_of(tiny)
    assert sorted(structure.cycle.tolist()) == sorted(spoken(tiny))
    assert sorted(structure.successor[structure.cycle].tolist()) == sorted(spoken(tiny))


@torch.inference_mode()
def drafts(folder: Path, text: Tensor) -> Tensor:
    """What the shared model's draft says to follow each token of a text but the first: [len(text) − 1]."""
    target = Qwen3NextForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = Qwen3NextConfig.from_hf(target.config)
    draft = MultiTokenPredictor(config, PlainEngine(rotary_table(target.config)), prefix="mtp")
    tensors, names = tensors_of(folder), expected_shapes(config, target=False, mtp=True)
    weights = {name.removeprefix("mtp."): tensors[name] for name in names if name.startswith("mtp.")}
    draft.load_state_dict(stacked(fused_experts(weights, config.num_experts)))
    hidden = target.model(text[None], use_cache=False).last_hidden_state[0, :-1]
    behind = draft.draft(target.get_input_embeddings()(text[1:]), hidden, torch.arange(len(text) - 1))
    return target.lm_head(behind).argmax(dim=1)


def fused_experts(weights: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """The checkpoint's experts, one by one, as the plain engine's stacked ones."""
    prefix = "layers.0.mlp.experts."
    parts = {
        name: torch.stack([weights[f"{prefix}{e}.{name}.weight"] for e in range(experts)])
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    others = {name: weight for name, weight in weights.items() if not name.startswith(prefix)}
    joined = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
    return others | {f"{prefix}w13": joined, f"{prefix}w2": parts["down_proj"]}


@pytest.mark.parametrize("acceptance", [0.0, 0.25, 0.7, 1.0])
def test_drafts_are_right_after_the_chosen_share_of_tokens(acceptance: float, tmp_path: Path) -> None:
    folder = written(tmp_path / "checkpoint", "--dtype", "float32", "--mtp-acceptance", acceptance, "--seed", 3)
    structure = structure_of(folder)
    for text in structure.cycle.split(200):
        right = drafts(folder, text) == structure.successor[text[1:]]
        assert torch.equal(right, structure.right[text[1:]])
    count = len(structure.cycle)
    assert int(structure.right.sum()) == max(1, round(acceptance * count))
    manifest = json.loads((folder / "qnext_checkpoint.json").read_text())
    assert manifest["mtp_acceptance"] == acceptance


def test_wrong_drafts_come_in_no_order_along_the_cycle(tiny: Path) -> None:
    structure = structure_of(tiny)
    right = structure.right[structure.cycle].float()
    both = float((right * right.roll(-1)).mean())
    assert abs(both - 0.7**2) < 0.05, "a draft after a right one is right as often as any"


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, again = (digests(written(tmp_path / name, "--seed", 7)) for name in ("a", "b"))
    assert first == again
    other = digests(written(tmp_path / "c", "--seed", 8))
    assert other["model.safetensors"] != first["model.safetensors"]
    assert other["tokenizer.json"] == first["tokenizer.json"]


@pytest.mark.parametrize("group", [None, 64], ids=["bfloat16", "int4"])
def test_shards_hold_the_tensors_of_one_file(group: int | None, tmp_path: Path) -> None:
    spec = Spec(kind=Kind.TINY, widths=TINY, int4=group)
    small, whole = plan(spec, shard_bytes=1 << 19), plan(spec)
    write(small, tmp_path / "small")
    write(whole, tmp_path / "whole")
    assert len(small.shards) > 3
    assert len(whole.shards) == 1
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "small").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    for file in files:
        with safe_open(file, "pt") as opened:
            assert {index["weight_map"][name] for name in opened.keys()} == {file.name}  # noqa: SIM118
    ours, theirs = tensors_of(tmp_path / "small"), tensors_of(tmp_path / "whole")
    assert ours.keys() == theirs.keys() == index["weight_map"].keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in ours.values()) == whole.bytes


def test_counted_parameters_and_bytes_are_those_on_the_disk(tiny: Path) -> None:
    status, output = run(tiny.parent / "other", "--dtype", "float32", "--dry-run")
    tensors = tensors_of(tiny)
    assert status == 0
    assert f"{sum(t.numel() for t in tensors.values()):,} parameters" in output
    assert f"{sum(t.numel() * t.element_size() for t in tensors.values()):,} bytes" in output
    assert not (tiny.parent / "other").exists()


def test_slice_has_the_parameters_of_the_published_model(tmp_path: Path) -> None:
    published = SLICE.model_copy(update={"num_hidden_layers": 48})
    made = plan(Spec(kind=Kind.SLICE, widths=published, mtp=False))
    assert made.parameters == pytest.approx(79.7e9, rel=0.005)
    status, output = run(tmp_path / "slice", "--kind", "slice", "--layers", 4, "--experts", 256, "--dry-run")
    assert status == 0
    assert "4 layers of width 2048, 256 experts, 151936 tokens" in output


def test_random_checkpoint_says_what_it_likes(tmp_path: Path) -> None:
    folder = written(tmp_path / "checkpoint", "--kind", "random", "--dtype", "float32")
    text = torch.arange(500)
    structure = structure_of(folder)
    said = successors(folder, text)
    assert (said == structure.successor[text]).float().mean() < 0.05
    assert len(set(said.tolist())) > 50


def test_yarn_stands_in_both_dialects_of_the_config(tmp_path: Path) -> None:
    folder = written(tmp_path / "checkpoint", "--yarn", 4.0, "--dtype", "float32")
    config = config_of(folder)
    assert config["max_position_embeddings"] == 4 * TINY.max_position_embeddings
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TINY.max_position_embeddings}
    assert config["rope_scaling"] == expected
    read = Qwen3NextForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert expected.items() <= read.config.rope_parameters.items()
    plain = written(tmp_path / "plain", "--dtype", "float32")
    frequencies = [Qwen3NextForCausalLM.from_pretrained(path).model.rotary_emb.inv_freq for path in (folder, plain)]
    assert not torch.equal(*frequencies)


def test_without_draft_there_are_no_draft_tensors(tmp_path: Path) -> None:
    folder = written(tmp_path / "checkpoint", "--no-mtp")
    assert not any(name.startswith("mtp.") for name in tensors_of(folder))
    assert config_of(folder)["num_nextn_predict_layers"] == 0


def test_fp8_is_the_bfloat16_checkpoint_within_its_rounding(tmp_path: Path) -> None:
    plain = tensors_of(written(tmp_path / "plain"))
    folder = written(tmp_path / "fp8", "--fp8")
    quantized = tensors_of(folder)
    scales = {name for name in quantized if name.endswith("_scale_inv")}
    assert quantized.keys() - scales == plain.keys()
    for name, weight in plain.items():
        if f"{name}_scale_inv" not in scales:
            assert torch.equal(weight, quantized[name]), name
            continue
        assert quantized[name].dtype == torch.float8_e4m3fn
        scale = quantized[f"{name}_scale_inv"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        restored = quantized[name].float() * scale
        # 3 bits behind the point: half of an eighth of the value, or of the smallest step near zero.
        allowed = torch.maximum(weight.float().abs() / 16, scale * 2**-10) * 1.001
        assert ((restored - weight.float()).abs() <= allowed).all(), name


def test_fp8_configuration_lists_what_is_not_quantized_as_transformers_reads_it(tmp_path: Path) -> None:
    folder = written(tmp_path / "checkpoint", "--fp8")
    stored = config_of(folder)["quantization_config"]
    assert {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}.items() <= stored.items()
    read = FineGrainedFP8Config.from_dict(stored)
    assert tuple(read.weight_block_size) == (128, 128)
    kept = set(read.modules_to_not_convert)
    assert {"lm_head", "mtp.fc", "model.layers.0.linear_attn.in_proj_ba", "model.layers.3.mlp.gate"} <= kept
    assert not any(name.endswith(("_proj", "in_proj_qkvz")) for name in kept)
    for name, tensor in tensors_of(folder).items():
        if tensor.dim() == 2 and tensor.dtype != torch.float8_e4m3fn and ".layers." in name:
            assert name.removesuffix(".weight") in kept or name.endswith("_scale_inv")


def test_quantized_blocks_use_the_whole_range() -> None:
    weight = torch.randn(256, 384) * torch.logspace(-3, 3, 384)
    values, scales = quantize(weight)
    assert scales.shape == (2, 3)
    largest = values.float().abs().view(2, 128, 3, 128).amax(dim=(1, 3))
    assert (largest >= 416).all()


def in_integers(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Numbers and scales of a checkpoint's weights in int4 and int8, by the weight's name."""
    found = {}
    for name, words in tensors.items():
        weight, is_packed, _ = name.partition("_packed")
        if is_packed:
            columns = int(tensors[f"{weight}_shape"][1])
            found[weight] = words.view(INT8) if words.shape[1] * 4 == columns else words, tensors[f"{weight}_scale"]
    return found


def dequantized(folder: Path, copy: Path) -> Path:
    """A copy of a checkpoint in int4 with what it stands for in float32."""
    tensors = tensors_of(shutil.copytree(folder, copy))
    weights = {name: dequantize(*packed, torch.float32) for name, packed in in_integers(tensors).items()}
    plain = {name: t for name, t in tensors.items() if not name.endswith(("_packed", "_scale", "_shape"))}
    save_file(plain | weights, copy / "model.safetensors", {"format": "pt"})
    config = config_of(folder)
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    return copy


WITH_INT8_TOO = [pytest.param((), id="int4 alone"), pytest.param(("--int8",), id="with int8")]


@pytest.fixture(scope="module", params=WITH_INT8_TOO)
def int4(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A structured checkpoint in int4."""
    return written(tmp_path_factory.mktemp("int4") / "checkpoint", "--int4", 32, *request.param)


@pytest.mark.parametrize("int8", WITH_INT8_TOO)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_is_the_bfloat16_checkpoint_within_its_rounding(group: int, int8: tuple[str, ...], tmp_path: Path) -> None:
    plain = tensors_of(written(tmp_path / "plain"))
    tensors = tensors_of(written(tmp_path / "int4", "--int4", group, *int8))
    packed = in_integers(tensors)
    assert packed.keys() == {name for name in plain if is_quantized(name)}
    for name, weight in plain.items():
        if name not in packed:
            assert torch.equal(weight, tensors[name]), name
            continue
        numbers, scale = packed[name]
        assert numbers.dtype == (INT8 if int8 and ".experts." not in name else INT4)
        assert scale.dtype == torch.bfloat16
        assert tensors[f"{name}_shape"].tolist() == list(weight.shape)
        assert scale.shape == (weight.shape[0], weight.shape[1] // group)
        steps = scale.float().repeat_interleave(group, 1)
        # Half a step, and more at the positive end, 7 of the largest magnitude's 7.5 or 127 of 127.5; scales are
        # rounded by a 512th, with the largest number that many times.
        error = (dequantize(numbers, scale, torch.float32) - weight.float()).abs()
        assert (error <= (0.54 if numbers.dtype == INT4 else 0.78) * steps).all(), name


def test_int4_tensors_are_those_that_its_configuration_promises(int4: Path) -> None:
    quantization = config_of(int4)["quantization_config"]
    integers = IntegerWeights(quantization)
    assert integers.group == 32
    shapes = expected_shapes(Spec(kind=Kind.TINY, widths=TINY).model(), mtp=True)
    left_out = {module for module in modules_of(shapes) if integers.bits(module) is None}
    assert {"lm_head", "mtp.fc", "model.layers.0.linear_attn.in_proj_ba", "model.layers.3.mlp.gate"} <= left_out
    assert not any(name.endswith(("_proj", "in_proj_qkvz", "experts")) for name in left_out)
    check_files(int4, integers.shapes(shapes))


@pytest.mark.parametrize("options", [(32,), (128, "--int8")])
def test_in_int4_the_greedy_continuation_and_the_drafts_are_as_known(
    options: tuple[object, ...], tmp_path: Path
) -> None:
    folder = written(tmp_path / "int4", "--int4", *options, "--seed", 5)
    plain, structure = dequantized(folder, tmp_path / "plain"), structure_of(folder)
    text = torch.randperm(structure.vocabulary, generator=torch.Generator().manual_seed(0))
    assert torch.equal(successors(plain, text), structure.successor[text])
    for tokens in structure.cycle.split(200):
        right = drafts(plain, tokens) == structure.successor[tokens[1:]]
        assert torch.equal(right, structure.right[tokens[1:]])


def test_compressed_tensors_reads_int4_as_the_same_numbers(int4: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="needs compressed-tensors")
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    config = QuantizationConfig.model_validate(config_of(int4)["quantization_config"])
    assert (config.format, config.quantization_status) == ("pack-quantized", QuantizationStatus.COMPRESSED)
    tensors, compressor = tensors_of(int4), compressors.BaseCompressor.get_value_from_registry(config.format)
    for name, packed in in_integers(tensors).items():
        scheme = config.config_groups["group_0" if packed[0].dtype == INT4 else "group_1"]
        parts = {f"weight_{part}": tensors[f"{name}_{part}"] for part in ("packed", "scale", "shape")}
        theirs = compressor.decompress(parts, scheme)["weight"]
        assert torch.equal(theirs, dequantize(*packed, theirs.dtype)), name
        exact = {"weight": dequantize(*packed, torch.float32), "weight_scale": packed[1].float()}
        again = compressor.compress(exact, scheme)
        assert torch.equal(again["weight_packed"], packed[0].view(INT4)), name


def test_transformers_reads_the_int4_configuration(int4: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    read = CompressedTensorsConfig.from_dict(config_of(int4)["quantization_config"])
    assert read.is_quantization_compressed
    assert read.quantization_config.ignore == config_of(int4)["quantization_config"]["ignore"]


def test_vllm_leaves_what_the_int4_configuration_ignores(int4: Path) -> None:
    theirs = pytest.importorskip(
        "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors", reason="needs vLLM"
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer

    from qnext_vllm.model import PACKED_MODULES

    config = theirs.CompressedTensorsConfig.from_config(config_of(int4)["quantization_config"])
    assert config.target_scheme_map["Linear"]["weights"].group_size == 32
    packed = {old: new for new, olds in PACKED_MODULES.items() for old in olds}
    for name, tensor in tensors_of(int4).items():
        module, _, kind = name.rpartition(".")
        if kind not in ("weight", "weight_packed") or tensor.dim() != 2 or "embed_tokens" in name:
            continue
        stem, _, last = module.rpartition(".")
        served = f"{stem}.{packed.get(last, last)}" if stem else module
        assert should_ignore_layer(served, config.ignore, PACKED_MODULES) == (kind == "weight"), name


def test_vllm_leaves_what_the_fp8_configuration_lists(tmp_path: Path) -> None:
    fp8 = pytest.importorskip("vllm.model_executor.layers.quantization.fp8", reason="needs vLLM")
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    from qnext_vllm.model import PACKED_MODULES

    folder = written(tmp_path / "checkpoint", "--fp8")
    config = fp8.Fp8Config.from_config(config_of(folder)["quantization_config"])
    assert config.weight_block_size == [128, 128]
    quantized = {name.rpartition(".")[0] for name, t in tensors_of(folder).items() if t.dtype == torch.float8_e4m3fn}
    packed = {old: new for new, olds in PACKED_MODULES.items() for old in olds}
    for name, tensor in tensors_of(folder).items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or tensor.dim() != 2 or ".experts." in name or "embed_tokens" in name:
            continue
        stem, _, last = module.rpartition(".")
        served = f"{stem}.{packed.get(last, last)}" if stem else module
        skipped = is_layer_skipped(served, config.ignored_layers, PACKED_MODULES)
        assert skipped == (module not in quantized), name


def test_generated_tokenizer_has_exactly_the_vocabulary_and_reads_its_own_text(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert len(tokenizer) == TINY.vocab_size
    for text in ("the quick brown fox", "naïve Ünïcode — 你好 🙂", "a\tb\nc"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode("the quick brown fox")) >= 256, "words are not spelled byte by byte"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert config_of(tiny)["eos_token_id"] == tokenizer.eos_token_id


def test_a_copied_tokenizer_decides_the_vocabulary_and_what_is_never_said(tmp_path: Path) -> None:
    folder = written(tmp_path / "checkpoint", "--tokenizer", TRAINED)
    assert (folder / "tokenizer.json").read_bytes() == (TRAINED / "tokenizer.json").read_bytes()
    config = config_of(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert config["vocab_size"] == len(tokenizer)
    assert config["eos_token_id"] == tokenizer.eos_token_id
    text = torch.arange(len(tokenizer))
    said = set(successors(folder, text, torch.bfloat16).tolist())
    assert not said & set(tokenizer.all_special_ids)
    assert len(said) > 0.98 * len(tokenizer)


def test_without_tokenizer_there_is_none(tmp_path: Path) -> None:
    folder = written(tmp_path / "checkpoint", "--no-tokenizer", "--vocab-size", 100)
    assert not list(folder.glob("token*"))
    assert config_of(folder)["eos_token_id"] == 99


def test_a_folder_with_files_is_replaced_only_when_forced(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "checkpoint")
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"old")
    before = digests(folder)
    status, output = run(folder, "--seed", 9)
    assert status == 2
    assert "--force" in output
    assert digests(folder) == before
    written(folder, "--seed", 9, "--force")
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(file.name for file in folder.glob("*.safetensors")) == ["model.safetensors"]
    assert digests(folder)["model.safetensors"] != before["model.safetensors"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(written: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(plan(Spec(kind=Kind.TINY, widths=TINY)), tmp_path / "checkpoint", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_too_small_a_disk_is_named_before_anything_is_written(tmp_path: Path) -> None:
    # Embedding and head take 8 KiB a token.
    tokens = shutil.disk_usage(tmp_path).free // 8192
    status, output = run(tmp_path / "slice", "--kind", "slice", "--vocab-size", tokens)
    assert status == 2
    assert "GB of free disk" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--layers", 3], "--layers: expected at least 4, got 3"),
        (["--layers", 0], "--layers: expected at least 4, got 0"),
        (["--experts", 0], "--experts: expected at least 1, got 0"),
        (["--experts-per-token", 0], "--experts-per-token: expected at least 1, got 0"),
        (["--mtp-acceptance", 1.5], "--mtp-acceptance: expected between 0 and 1, got 1.5"),
        (["--kind", "random", "--mtp-acceptance", 0.5], "--mtp-acceptance: expected with a structured checkpoint"),
        (["--no-mtp", "--mtp-acceptance", 0.5], "got --no-mtp"),
        (["--yarn", 0.5], "--yarn: expected a factor above 1, such as 4.0, got 0.5"),
        (["--fp8", "--dtype", "float32"], "--dtype: expected bfloat16 beside --fp8, got float32"),
        (["--fp8", "--hidden-size", 192], "--fp8: expected widths that are multiples of 128"),
        (["--int4", 16], "--int4: expected 32, 64 or 128, got 16"),
        (["--int4", 32, "--fp8"], "--int4: expected without --fp8, got both"),
        (["--int8"], "--int8: expected beside --int4, got it alone"),
        (["--int4", 32, "--dtype", "float32"], "--dtype: expected bfloat16 beside --int4, got float32"),
        (
            ["--int4", 128, "--hidden-size", 192],
            "--int4: expected columns in whole groups of 128, got model.layers.0.linear_attn.in_proj_qkvz.weight of [",
        ),
        (["--hidden-size", 32], "--hidden-size: expected at least"),
        (["--vocab-size", 200], "--vocab-size: expected 259 to"),
        (["--experts", 4, "--experts-per-token", 5], "--experts-per-token: expected at most the 4 experts, got 5"),
        (["--seed", -1], "--seed: expected 0 or more, got -1"),
        (["--tokenizer", "/nowhere"], "--tokenizer: expected a folder with a tokenizer.json, got /nowhere"),
        (["--tokenizer", TRAINED, "--no-tokenizer"], "--no-tokenizer: expected without --tokenizer, got both"),
        (
            ["--tokenizer", TRAINED, "--vocab-size", 1000],
            "--vocab-size: expected at least the tokenizer's 2048, got 1000",
        ),
    ],
)
def test_a_wrong_argument_gets_one_line(arguments: list[object], line: str, tmp_path: Path) -> None:
    status, output = run(tmp_path / "checkpoint", *arguments)
    assert status == 2
    (error,) = [text for text in output.splitlines() if text.startswith("qnext checkpoint:")]
    assert line in error
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_is_none_is_named_with_those_that_are(tmp_path: Path) -> None:
    status, output = run(tmp_path / "checkpoint", "--dtype", "float16")
    assert status == 2
    assert all(word in output for word in ("--dtype", "float16", "bfloat16", "float32"))


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, output = run(tmp_path / "file")
    assert status == 2
    assert "OUT: expected a folder, got the file" in output


def test_codes_at_the_smallest_width_are_far_enough_apart() -> None:
    vocabulary = 4096
    structure = Structure(vocabulary, smallest_hidden_size(vocabulary), (), 0.5, seed=0)
    codes = structure.codes.float()
    cosines = codes @ codes.T / (codes.shape[1] - 1)
    assert cosines.fill_diagonal_(0).max() < 0.9


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    status, output = run(tmp_path / "out", "--tokenizer", tmp_path)
    assert status == 2
    assert f"--tokenizer: {tmp_path} cannot be read" in output


PEAK = """
import resource, sys
from pathlib import Path
from qnext_plugins.cli.checkpoint import Kind, Spec, plan, write
from qnext_plugins.cli.checkpoint.spec import SLICE
widths = SLICE.model_copy(update={"num_experts": 32, "vocab_size": 8192})
planned = plan(Spec(kind=Kind.SLICE, widths=widths), shard_bytes=128 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write(planned, Path(sys.argv[1]), with_tokenizer=False)
print(planned.bytes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


@pytest.fixture(scope="module")
def real_widths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """A slice of over a gigabyte, its bytes, and the memory that writing it took."""
    folder = tmp_path_factory.mktemp("slice") / "checkpoint"
    command = [sys.executable, "-c", PEAK, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    size, peak = map(int, done.stdout.split())
    return folder, size, peak


def test_memory_stays_small_beside_a_large_checkpoint(real_widths: tuple[Path, int, int]) -> None:
    folder, size, peak = real_widths
    assert sum(file.stat().st_size for file in folder.iterdir()) > size > 1e9
    assert peak < 0.4 * size, f"{peak / 1e9:.2f} GB of memory for {size / 1e9:.2f} GB"


def test_slice_at_real_widths_says_the_successors_in_bfloat16(real_widths: tuple[Path, int, int]) -> None:
    folder, _, _ = real_widths
    widths = config_of(folder)
    tokens = widths["vocab_size"]
    structure = Structure(tokens, widths["hidden_size"], [tokens - 1], 0.7, seed=0)
    text = structure.cycle[:48]
    assert torch.equal(successors(folder, text, torch.bfloat16), structure.successor[text])


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("vllm", "sglang")]
)
def test_an_engine_follows_the_cycle_and_accepts_the_chosen_share(engine: str, tmp_path: Path) -> None:
    engines = pytest.importorskip(f"tests.{engine}.engines", reason=f"needs {engine}")
    folder = written(tmp_path / "checkpoint", "--dtype", "float32", "--mtp-acceptance", 0.7)
    structure = structure_of(folder)
    prompts = [tuple(piece[:5].tolist()) for piece in structure.cycle.split(100)[:8]]
    expected = [tuple(structure.cycle.roll(-start - 5)[:90].tolist()) for start in range(0, 800, 100)]
    with engines.engine(folder, drafts=1) as running:
        assert running.greedy(prompts, max_tokens=90) == expected
        drafts = running.drafts() if engine == "vllm" else running.drafts
    print(f"accepted {drafts.accepted} of {drafts.drafted} first drafts")
    assert drafts.drafted > 350
    assert abs(drafts.accepted / drafts.drafted - 0.7) < 0.08
