"""The flags that engines get which are started beside others on a CPU."""

from __future__ import annotations

from decimal import Decimal

import pytest

from qnext_plugins.cli.compare.fitting import SHARED, Fitting, fitting
from qnext_plugins.cli.compare.sides import parse_side
from qnext_plugins.cli.doctor.machine import memory_bytes


def flags(text: str, sides: int = 3, *, on_cpu: bool = True) -> dict[str, str]:
    """The flags that are added to a side, with their values."""
    added = fitting(parse_side(text), sides, on_cpu=on_cpu).flags
    return dict(zip(added[::2], added[1::2], strict=True))


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


@pytest.mark.parametrize("sides", [1, 2, 3, 5])
def test_all_shares_together_leave_a_part_of_the_free_memory(sides: int) -> None:
    memory = memory_bytes()
    vllm = float(flags("vllm:m", sides)["--gpu-memory-utilization"]) * memory["MemTotal"]
    sglang = Decimal(flags("sglang:m --device cpu", sides)["--mem-fraction-static"])
    # What is free changes while this runs.
    assert 0 < sides * vllm <= 1.05 * SHARED * memory["MemAvailable"]
    assert 0 < sides * sglang <= Decimal(str(SHARED))


@pytest.mark.parametrize(
    "text",
    [
        "vllm:m --gpu-memory-utilization 0.5",
        "vllm:m --gpu_memory_utilization=0.5",
        "vllm:m --kv-cache-memory-bytes 1G",
        "vllm:m --config flags.yaml",
        "sglang:m --device cpu --mem-fraction-static 0.5",
        "sglang:m --device cpu --max-total-tokens 4096",
        "hf:m",
    ],
)
def test_what_the_user_has_said_stays(text: str) -> None:
    assert fitting(parse_side(text), 3, on_cpu=True) == Fitting()


def test_variable_of_vllm_is_the_users_word_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert flags("vllm:m") == {}
    assert "--mem-fraction-static" in flags("sglang:m --device cpu")


def test_sglang_is_told_that_there_is_only_a_cpu() -> None:
    assert flags("sglang:m --max-total-tokens 4096") == {"--device": "cpu"}
    assert "--device" not in flags("sglang:m --device=cpu")


@pytest.mark.parametrize("text", ["vllm:m", "sglang:m", "hf:m"])
def test_nothing_is_added_where_there_is_an_accelerator(text: str) -> None:
    assert fitting(parse_side(text), 3, on_cpu=False) == Fitting()


def test_added_flags_are_said_in_one_line() -> None:
    fits = fitting(parse_side("sglang:m"), 2, on_cpu=True)
    assert fits.line == "started with --device cpu --mem-fraction-static 0.40, to fit on this CPU beside the others"
