"""How hooks are installed, on throw-away modules."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.plugins.hook_registry import HookRegistry

from qnext_sglang.cpu import hooks as cpu_hooks
from qnext_sglang.cpu.attention import CpuAttentionBackend
from qnext_sglang.cpu.platform import ATTENTION_BACKEND
from qnext_sglang.hooks import Hook, install, unresolved

OWNER, IMPORTER = "hooked_owner", "hooked_importer"


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HookRegistry, "_hooks", HookRegistry._hooks.__class__(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType(OWNER)
    exec("def double(x):\n    return 2 * x\n\nclass Shop:\n    def price(self, x):\n        return x\n", vars(module))
    monkeypatch.setitem(sys.modules, OWNER, module)
    return module


@pytest.fixture
def importer(monkeypatch: pytest.MonkeyPatch, owner: ModuleType) -> ModuleType:
    """A module that has imported the function by name, under another one."""
    module = ModuleType(IMPORTER)
    module.twice = owner.double
    monkeypatch.setitem(sys.modules, IMPORTER, module)
    return module


def triple(x: int) -> int:
    return 3 * x


def plus_one(original: Callable[..., Any], *arguments: Any) -> Any:
    return original(*arguments) + 1


def test_replacement_is_visible_to_modules_that_imported_the_name(owner: ModuleType, importer: ModuleType) -> None:
    install([Hook(f"{OWNER}.double", triple)])
    assert (owner.double(5), importer.twice(5)) == (15, 15)


def test_around_gets_the_original(owner: ModuleType, importer: ModuleType) -> None:
    install([Hook(f"{OWNER}.double", plus_one, around=True)])
    assert (owner.double(5), importer.twice(5)) == (11, 11)


def test_around_a_method_gets_the_original_and_the_object(owner: ModuleType) -> None:
    install([Hook(f"{OWNER}.Shop.price", plus_one, around=True)])
    assert owner.Shop().price(7) == 8


def test_hooks_are_installed_once(owner: ModuleType) -> None:
    for _ in range(3):
        install([Hook(f"{OWNER}.double", plus_one, around=True)])
    assert owner.double(5) == 11
    assert len(HookRegistry._hooks[f"{OWNER}.double"]) == 1


def test_hook_that_came_later_is_installed_beside_the_first(owner: ModuleType) -> None:
    first = [Hook(f"{OWNER}.double", plus_one, around=True)]
    install(first)
    install([*first, Hook(f"{OWNER}.Shop.price", plus_one, around=True)])
    assert (owner.double(5), owner.Shop().price(7)) == (11, 8)


def test_missing_targets_are_all_named_and_nothing_is_touched(owner: ModuleType, importer: ModuleType) -> None:
    missing = [f"{OWNER}.halve", f"{OWNER}.Shop.cost", "hooked_nowhere.double"]
    double = owner.double
    with pytest.raises(LookupError) as error:
        install([Hook(f"{OWNER}.double", triple), *(Hook(target, triple) for target in missing)])
    assert all(target in str(error.value) for target in missing)
    assert f"{OWNER}.double" not in str(error.value)
    assert owner.double is importer.twice is double
    assert not HookRegistry._hooks
    assert not HookRegistry._patched


def test_target_that_cannot_be_hooked_is_an_error(owner: ModuleType) -> None:
    with pytest.raises(LookupError, match=rf"{OWNER}\.Shop"):
        install([Hook(f"{OWNER}.Shop", plus_one, around=True)])  # SGLang wraps no class, and only logs that


def test_unresolved_are_those_that_do_not_exist(owner: ModuleType) -> None:
    targets = [f"{OWNER}.double", f"{OWNER}.halve", f"{OWNER}.Shop.price"]
    assert unresolved([Hook(target, triple) for target in targets]) == [f"{OWNER}.halve"]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, owner: ModuleType) -> None:
    """One name to set, free as SGLang's are without CUDA."""
    owner.sample = None
    monkeypatch.setattr(cpu_hooks, "NAMES", {f"{OWNER}.sample": triple})
    monkeypatch.setitem(ATTENTION_BACKENDS, ATTENTION_BACKEND, None)


@pytest.mark.usefixtures("names")
def test_names_and_the_attention_backend_are_set(owner: ModuleType) -> None:
    cpu_hooks.install_names()
    assert owner.sample is triple
    assert ATTENTION_BACKENDS[ATTENTION_BACKEND] is CpuAttentionBackend


@pytest.mark.usefixtures("names")
def test_missing_name_is_an_error(owner: ModuleType) -> None:
    del owner.sample
    with pytest.raises(LookupError, match=f"{OWNER}.sample"):
        cpu_hooks.install_names()
