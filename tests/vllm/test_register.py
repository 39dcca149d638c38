"""What ``register()`` does, on the real registry: serve, or step back with one line."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.registry import ModelRegistry, _LazyRegisteredModel

import qnext_vllm
from qnext_kernels.dispatch import deterministic, is_deterministic
from qnext_vllm import ARCHITECTURES, UnsupportedEngineError, register
from qnext_vllm.serving import prepare_process
from tests.checkpoints import TINY

IN_TREE = {
    "Qwen3NextForCausalLM": "vllm.model_executor.models.qwen3_next",
    "Qwen3NextMTP": "vllm.model_executor.models.qwen3_next_mtp",
}


@pytest.fixture(autouse=True)
def in_tree_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's registry as it is before any plugin is loaded."""
    for architecture, module in IN_TREE.items():
        monkeypatch.setitem(ModelRegistry.models, architecture, _LazyRegisteredModel(module, architecture))


def serving() -> dict[str, str]:
    return {architecture: ModelRegistry.models[architecture].module_name for architecture in ARCHITECTURES}


def test_the_entry_point_is_register() -> None:
    (entry,) = entry_points(group="vllm.general_plugins", name="qnext")
    assert entry.load() is register


def test_both_models_become_ours() -> None:
    register()
    assert serving() == {"Qwen3NextForCausalLM": "qnext_vllm.model", "Qwen3NextMTP": "qnext_vllm.mtp"}


def test_unsupported_version_leaves_the_in_tree_model_with_one_line(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    register()
    assert serving() == IN_TREE
    (line,) = lines
    assert "0.31.0" in line
    assert qnext_vllm.SUPPORTED_VLLM in line
    assert "\n" not in line


def test_unsupported_platform_leaves_the_in_tree_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    register()
    assert serving() == IN_TREE


def test_strict_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    monkeypatch.setenv("QNEXT_STRICT", "1")
    with pytest.raises(UnsupportedEngineError, match=r"0\.31\.0"):
        register()


def test_strict_raises_beside_an_invalid_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QNEXT_STRICT", "1")
    monkeypatch.setenv("QNEXT_DISABLE", "maybe")
    with pytest.raises(UnsupportedEngineError, match="QNEXT_DISABLE: expected 1 or 0, got 'maybe'"):
        register()


def test_unknown_forced_backend_leaves_the_in_tree_model(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    monkeypatch.setenv("QNEXT_BACKEND", "fastest")
    register()
    assert serving() == IN_TREE
    (line,) = lines
    assert "QNEXT_BACKEND" in line


def test_disabled_leaves_the_in_tree_model_silently(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    monkeypatch.setenv("QNEXT_DISABLE", "1")
    register()
    assert serving() == IN_TREE
    assert not lines


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False)])
def test_vllms_own_variable_turns_the_deterministic_mode_on(
    monkeypatch: pytest.MonkeyPatch, value: str, on: bool
) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", value)
    with deterministic(False):
        register()
        assert is_deterministic() == on


def test_the_deterministic_mode_raises_where_the_in_tree_model_would_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    monkeypatch.setenv("QNEXT_DETERMINISTIC", "1")
    with pytest.raises(UnsupportedEngineError, match=r"0\.31\.0"):
        register()


def test_what_is_forced_gets_compiled_graphs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        config = EngineArgs(str(TINY), dtype="bfloat16", max_model_len=128).create_engine_config()
        prepare_process(config, "Qwen3NextForCausalLM")
        return config.compute_hash()

    monkeypatch.delenv("QNEXT_BACKEND", raising=False)
    default = key()
    assert key() == default
    monkeypatch.setenv("QNEXT_BACKEND", "moe=cpu")
    assert key() != default
