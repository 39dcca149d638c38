"""Which page size a CPU gets, and how keys and values lie in pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.server_args import ServerArgs

from qnext_sglang.cpu.attention import CpuKVPool
from qnext_sglang.cpu.defaults import PAGE_SIZE, THREADS_BIND, apply_defaults
from tests.checkpoints import TINY

PAGED: list[dict[str, Any]] = [
    {},
    {"speculative_algorithm": "NEXTN"},
    {"mamba_radix_cache_strategy": "extra_buffer", "disable_overlap_schedule": True},
    {"disable_radix_cache": True, "mamba_track_interval": 96},
    {"chunked_prefill_size": 2 * PAGE_SIZE, "mamba_track_interval": PAGE_SIZE},
    {"chunked_prefill_size": -1},
]
# SGLang has pages of one token only, or none of ours, with these.
UNPAGED: list[dict[str, Any]] = [
    {"mamba_radix_cache_strategy": "no_buffer"},
    {"disable_overlap_schedule": True},
    {"linear_attn_backend": "flashinfer"},
    {"chunked_prefill_size": PAGE_SIZE + 1},
    {"mamba_track_interval": 96},
]


@pytest.fixture(autouse=True)
def bound_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS_BIND, "0")


def chosen(**given: Any) -> int | None:
    server_args = ServerArgs(model_path=str(TINY), **given)
    apply_defaults(server_args)
    return server_args.page_size


@pytest.mark.parametrize("given", PAGED, ids=str)
def test_pages_are_taken_where_sglang_has_them(given: dict[str, Any]) -> None:
    assert chosen(**given) == PAGE_SIZE


@pytest.mark.parametrize("given", UNPAGED, ids=str)
def test_none_are_chosen_where_sglang_would_end_or_cache_otherwise(given: dict[str, Any]) -> None:
    assert chosen(**given) is None


@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_a_page_size_of_the_user_stays(page_size: int) -> None:
    assert chosen(page_size=page_size) == page_size


@pytest.mark.parametrize("page_size", [1, 4])
def test_keys_and_values_of_a_head_lie_in_a_row_in_a_page(page_size: int) -> None:
    heads, dim, slots = 3, 8, torch.tensor([4, 5, 6, 7, 12])
    pool = CpuKVPool(16, page_size, torch.float32, heads, dim, 1, "cpu", enable_memory_saver=False)
    keys, values = torch.randn(2, len(slots), heads, dim)
    pool.set_kv_buffer(None, KVWriteLoc(slots, None), keys, values, layer_id_override=0)
    for buffer, written in ((pool.get_key_buffer(0), keys), (pool.get_value_buffer(0), values)):
        assert buffer.shape == (16 + page_size, heads, dim)
        assert torch.equal(buffer[slots], written)
        assert buffer.count_nonzero() == written.count_nonzero(), "the rest is as it was"
        assert buffer[4:8, 1].is_contiguous() == (page_size > 1)
    pool.move_kv_cache(torch.tensor([1]), torch.tensor([12]))
    assert torch.equal(pool.get_key_buffer(0)[1], keys[4])
    assert torch.equal(pool.get_value_buffer(0)[1], values[4])
