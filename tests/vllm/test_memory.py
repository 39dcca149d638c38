"""The memory that vLLM gives our layers on a CPU."""

from __future__ import annotations

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from qnext_kernels.memory import HUGE_PAGE
from qnext_plugins.model import Qwen3NextConfig
from qnext_vllm.gated_delta_net import GatedDeltaNetState
from tests.checkpoints import TINY
from tests.kernels.test_memory import THP, huge_bytes


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="this system has no huge pages")
def test_states_and_attentions_cache_lie_on_huge_pages() -> None:
    config = EngineArgs(str(TINY), dtype="bfloat16", max_model_len=128, max_num_seqs=8).create_engine_config()
    qwen = Qwen3NextConfig.from_hf(config.model_config.hf_text_config)
    layer = GatedDeltaNetState(qwen, config, prefix="model.layers.0.linear_attn")
    page = layer.get_kv_cache_spec(config).page_size_bytes
    of_all_layers = torch.zeros(16 * HUGE_PAGE, dtype=torch.int8)
    layer.bind_kv_cache(of_all_layers[: 3 * page].view(3, 1, 1, page))
    assert [state.shape[0] for state in layer.kv_cache] == [3, 3]
    assert huge_bytes(of_all_layers) >= 14 * HUGE_PAGE
