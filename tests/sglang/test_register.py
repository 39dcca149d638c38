"""What ``activate()`` and ``register()`` do: serve, or step back with one line."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import sglang.srt.models.registry as registry_module
import torch
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.arg_groups.overrides import declare_resolution
from sglang.srt.platforms.interface import SRTPlatform
from sglang.srt.plugins import GENERAL_PLUGINS_GROUP, PLATFORM_PLUGINS_GROUP
from sglang.srt.server_args import ServerArgs

import qnext_sglang
from qnext_plugins import gpus
from qnext_sglang import MODELS_PACKAGE, MODELS_VARIABLE, SUPPORTED_SGLANG, activate, register
from qnext_sglang.cpu.platform import ATTENTION_BACKEND
from qnext_sglang.serving import stored_config, unserved_flags
from tests.checkpoints import TINY
from tests.logged import logged
from tests.sglang.platforms import Gpu

REGISTRY = registry_module.__name__
OURS = {
    "Qwen3NextForCausalLM": "qnext_sglang.models.qwen3_next",
    "Qwen3NextForCausalLMMTP": "qnext_sglang.models.qwen3_next_mtp",
}
IN_TREE = {name: module.replace("qnext_sglang", "sglang.srt") for name, module in OURS.items()}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user who has set nothing, on a machine without accelerator, and SGLang's own models."""
    for variable in ("QNEXT_BACKEND", "QNEXT_DETERMINISTIC", "QNEXT_DISABLE", "QNEXT_STRICT", "SGLANG_USE_CPU_ENGINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(MODELS_VARIABLE, "")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    models = registry_module.import_model_classes("sglang.srt.models")
    monkeypatch.setattr(registry_module.ModelRegistry, "models", {name: models[name] for name in OURS})
    monkeypatch.setattr("sglang.srt.models.registry", registry_module)
    choices = list(ATTENTION_BACKEND_CHOICES)
    # An engine that ran in this process before has put ours in.
    ATTENTION_BACKEND_CHOICES[:] = [name for name in choices if name != ATTENTION_BACKEND]
    yield
    ATTENTION_BACKEND_CHOICES[:] = choices


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang has not imported its registry of models yet."""
    monkeypatch.delitem(sys.modules, REGISTRY)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the plugin logs."""
    with logged(qnext_sglang.logger) as messages:
        yield messages


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process on a GPU of NVIDIA, where Triton works, which has imported nothing of the CPU's."""
    monkeypatch.setattr("sglang.srt.platforms._current_platform", Gpu())
    monkeypatch.setattr(gpus, "triton_works", lambda: True)
    for module in [name for name in sys.modules if name.startswith("qnext_sglang.cpu")]:
        monkeypatch.delitem(sys.modules, module)


def unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.1" if name == "sglang" else real(name))


def serving() -> dict[str, str]:
    return {name: model.__module__ for name, model in registry_module.ModelRegistry.models.items()}


def assert_nothing_registered() -> None:
    assert serving() == IN_TREE
    assert not os.environ[MODELS_VARIABLE]


def test_entry_points_are_activate_and_register() -> None:
    (platform,) = entry_points(group=PLATFORM_PLUGINS_GROUP, name="qnext")
    (plugin,) = entry_points(group=GENERAL_PLUGINS_GROUP, name="qnext")
    assert (platform.load(), plugin.load()) == (activate, register)


def test_platform_is_ours_without_accelerator() -> None:
    platform = activate()
    assert platform is not None
    assert issubclass(pkgutil.resolve_name(platform), SRTPlatform)


@pytest.mark.parametrize(
    ("variable", "value"), [("SGLANG_USE_CPU_ENGINE", "1"), ("QNEXT_DISABLE", "1"), ("QNEXT_DISABLE", "perhaps")]
)
def test_platform_is_not_ours_with(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    assert activate() is None


def test_platform_is_not_ours_with_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert activate() is None


def test_platform_is_not_ours_with_an_unsupported_version(monkeypatch: pytest.MonkeyPatch) -> None:
    unsupported(monkeypatch)
    assert activate() is None


@pytest.mark.usefixtures("early")
def test_before_the_registry_only_the_variable_is_set(lines: list[str]) -> None:
    register()
    assert os.environ[MODELS_VARIABLE] == MODELS_PACKAGE
    assert REGISTRY not in sys.modules
    assert not lines


@pytest.mark.usefixtures("early")
def test_process_that_inherits_the_variable_imports_no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODELS_VARIABLE, MODELS_PACKAGE)
    register()
    assert REGISTRY not in sys.modules


def test_behind_the_registry_both_models_become_ours(lines: list[str]) -> None:
    register()
    assert serving() == OURS
    assert not os.environ[MODELS_VARIABLE]
    assert not lines


@pytest.mark.usefixtures("early")
def test_package_of_the_user_keeps_its_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "models_of_the_user"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "theirs.py").write_text("class Theirs:\n    pass\n\n\nEntryClass = Theirs\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(MODELS_VARIABLE, package.name)
    register()
    assert os.environ[MODELS_VARIABLE] == package.name
    assert set(sys.modules[REGISTRY].ModelRegistry.models) == {"Theirs", *OURS}


def test_attention_backend_becomes_a_choice() -> None:
    register()
    assert "qnext" in ATTENTION_BACKEND_CHOICES


def test_unsupported_version_leaves_the_in_tree_model_with_one_line(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    unsupported(monkeypatch)
    register()
    assert_nothing_registered()
    (line,) = lines
    assert "0.6.1" in line
    assert SUPPORTED_SGLANG in line


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [("QNEXT_BACKEND", "fastest", "fastest"), ("QNEXT_DISABLE", "perhaps", "QNEXT_DISABLE: expected 1 or 0")],
)
def test_unknown_value_leaves_the_in_tree_model_with_one_line(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], variable: str, value: str, named: str
) -> None:
    monkeypatch.setenv(variable, value)
    register()
    assert_nothing_registered()
    (line,) = lines
    assert named in line
    assert "\n" not in line


def test_anything_unforeseen_leaves_the_in_tree_model_with_one_line(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("first\n  second")

    monkeypatch.setattr(qnext_sglang, "refusal", fail)
    register()
    assert_nothing_registered()
    (line,) = lines
    assert line.endswith("RuntimeError: first second")


@pytest.mark.parametrize("variable", ["QNEXT_STRICT", "QNEXT_DETERMINISTIC"])
def test_strict_ends_the_process_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], variable: str
) -> None:
    unsupported(monkeypatch)
    monkeypatch.setenv(variable, "1")
    with pytest.raises(SystemExit, match=r"0\.6\.1"):
        register()
    assert_nothing_registered()
    assert not lines


@pytest.mark.parametrize("strict", ["0", "1"])
def test_disabled_leaves_the_in_tree_model_silently(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], strict: str
) -> None:
    monkeypatch.setenv("QNEXT_DISABLE", "1")
    monkeypatch.setenv("QNEXT_STRICT", strict)
    register()
    assert_nothing_registered()
    assert not lines


@pytest.mark.usefixtures("on_cuda")
def test_a_gpu_that_is_not_served_keeps_the_in_tree_model_with_one_line(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr(gpus, "triton_works", lambda: False)
    register()
    assert_nothing_registered()
    assert lines == ["qnext-plugins leaves SGLang's own Qwen3-Next in place: no Triton works on this machine"]
    assert "qnext" not in ATTENTION_BACKEND_CHOICES


@pytest.mark.usefixtures("on_cuda")
def test_a_gpu_is_served_by_ours_and_nothing_of_the_cpu_is_imported(lines: list[str]) -> None:
    register()
    assert serving() == OURS
    assert not lines
    assert not [name for name in sys.modules if name.startswith("qnext_sglang.cpu")]


def test_fresh_process_finds_our_models_and_imports_them_late() -> None:
    script = f"""
import json, os, sys
from sglang.srt.platforms import current_platform
from sglang.srt.plugins import load_plugins
load_plugins()
heavy = [name for name in ("qnext_sglang.models", "{REGISTRY}") if name in sys.modules]
from {REGISTRY} import ModelRegistry
found = {{name: ModelRegistry.resolve_model_cls(name)[0].__module__ for name in {list(OURS)}}}
print(json.dumps([type(current_platform).__name__, os.environ["{MODELS_VARIABLE}"], heavy, found]))
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == ["CpuPlatform", MODELS_PACKAGE, [], OURS]


UNSERVED: list[tuple[str, dict[str, Any]]] = [
    ("--enable-dp-attention", {"enable_dp_attention": True}),
    ("--attn-dp-size", {"attn_dp_size": 2}),
    ("--attn-cp-size", {"attn_cp_size": 2}),
    ("--dcp-size", {"dcp_size": 2}),
    ("--moe-dp-size", {"moe_dp_size": 2}),
    ("--pp-size", {"pp_size": 2}),
    ("--moe-a2a-backend deepep", {"moe_a2a_backend": "deepep"}),
    ("--enable-eplb", {"enable_eplb": True}),
    ("--ep-num-redundant-experts", {"ep_num_redundant_experts": 8}),
    ("--init-expert-location", {"init_expert_location": "placement.json"}),
    ("--expert-distribution-recorder-mode", {"expert_distribution_recorder_mode": "stat"}),
    ("--enable-return-routed-experts", {"enable_return_routed_experts": True}),
    ("--enable-return-aux-hidden-states", {"enable_return_aux_hidden_states": True}),
    ("--cpu-offload-gb", {"cpu_offload_gb": 4}),
    ("--offload-group-size", {"offload_group_size": 2}),
    ("--rl-on-policy-target", {"rl_on_policy_target": "fsdp"}),
    ("--kv-cache-dtype nvfp4", {"kv_cache_dtype": "nvfp4"}),
    ("--enable-two-batch-overlap", {"enable_two_batch_overlap": True}),
    ("--enable-lora", {"enable_lora": True}),
    ("--enable-lora", {"lora_paths": ["adapter"]}),
    ("--enable-mis", {"enable_mis": True}),
    (
        "--flashinfer-allreduce-fusion-backend cutedsl",
        {"flashinfer_allreduce_fusion_backend": "cutedsl"},
    ),
    ("--enable-linear-replayssm", {"enable_linear_replayssm": True}),
    ("--enable-linear-replayssm-spec", {"enable_linear_replayssm_spec": True}),
    ("--speculative-algorithm NGRAM", {"speculative_algorithm": "NGRAM"}),
    ("--speculative-algorithm EAGLE3", {"speculative_algorithm": "EAGLE3"}),
    ("--speculative-eagle-topk 4", {"speculative_algorithm": "EAGLE", "speculative_eagle_topk": 4}),
]


@pytest.mark.parametrize(("flag", "given"), UNSERVED, ids=[" ".join(map(str, given)) for _, given in UNSERVED])
def test_unserved_flag_is_named(flag: str, given: dict[str, Any]) -> None:
    reason = unserved_flags(ServerArgs(model_path="checkpoint", **given))
    assert reason is not None
    assert reason.removeprefix("it does not serve ").startswith(flag)
    assert ", " not in reason, "flags that were not given are named too"


def test_all_unserved_flags_are_named_at_once() -> None:
    reason = unserved_flags(ServerArgs(model_path="checkpoint", pp_size=2, enable_eplb=True))
    assert reason is not None
    assert "--pp-size" in reason
    assert "--enable-eplb" in reason


def test_what_sglang_has_resolved_counts() -> None:
    arguments = ServerArgs(model_path="checkpoint", speculative_algorithm="nextn")
    declare_resolution(arguments, "test", attn_dp_size=2, speculative_algorithm="EAGLE")
    assert unserved_flags(arguments) == "it does not serve --attn-dp-size above 1"
    declare_resolution(arguments, "test", model_path=str(TINY))
    assert stored_config(arguments)["architectures"] == ["Qwen3NextForCausalLM"]


@pytest.mark.parametrize("algorithm", [None, "NEXTN", "EAGLE"])
def test_everything_else_is_served(algorithm: str | None) -> None:
    arguments = ServerArgs(
        model_path="checkpoint", tp_size=2, speculative_algorithm=algorithm, speculative_eagle_topk=algorithm and 1
    )
    assert unserved_flags(arguments) is None
