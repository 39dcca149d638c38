"""From a checkpoint to the model: its configuration as SGLang hands it on, its tensors into SGLang's parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from qnext_plugins.model import Qwen3NextConfig
from qnext_plugins.model.weights import IGNORED_SUFFIXES
from qnext_sglang import sglang_api as api
from qnext_sglang.serving import check_interval, stored_config

# (part of the checkpoint's name, part of the parameter's name, which share of it)
STACKED = (
    (".q_proj.", ".qkv_proj.", "q"),
    (".k_proj.", ".qkv_proj.", "k"),
    (".v_proj.", ".qkv_proj.", "v"),
    (".gate_proj.", ".gate_up_proj.", 0),
    (".up_proj.", ".gate_up_proj.", 1),
)
JOINED = ((".in_proj_qkvz.", ".in_proj_qkvzba.", 0), (".in_proj_ba.", ".in_proj_qkvzba.", 1))
"""The same of linears that may be joined."""
# On a CPU, SGLang pads these for its AMX kernels and keeps the checkpoint's values under these names.
UNPADDED = {
    "original_num_attention_heads": "num_attention_heads",
    "original_total_num_kv_heads": "num_key_value_heads",
    "original_intermediate_size": "intermediate_size",
    "original_moe_intermediate_size": "moe_intermediate_size",
    "original_shared_expert_intermediate_size": "shared_expert_intermediate_size",
}


def read_config(hf_config: Any) -> Qwen3NextConfig:
    """The checkpoint's own configuration.

    Raises:
        ConfigError: a field is missing or has a value that is not served.
    """
    check_interval(getattr(hf_config, "full_attention_interval", None))
    own = copy.copy(hf_config)
    for original, name in UNPADDED.items():
        if (value := getattr(hf_config, original, None)) is not None:
            setattr(own, name, value)
    return Qwen3NextConfig.from_hf(own)


def rope_parameters(hf_config: Any) -> dict[str, Any]:
    """Base, rotated share and scaling of the rotary embedding, as ``rope_parameters`` of transformers 5.

    SGLang's configuration keeps ``rope_theta``, ``partial_rotary_factor`` and ``rope_scaling`` of a config.json and
    drops ``rope_parameters``, the only place where transformers 5 writes them: the checkpoint's file is read again.
    """
    stored = stored_config(api.get_server_args())
    written = stored.get("rope_parameters") or {}
    parameters = dict(hf_config.rope_scaling or {"rope_type": "default"} | written)
    for name in ("rope_theta", "partial_rotary_factor"):
        known = getattr(hf_config, name)
        parameters[name] = known if name in stored else parameters.get(name, written.get(name, known))
    return parameters


def load_parameters(model: nn.Module, weights: Iterable[tuple[str, Tensor]], num_experts: int) -> set[str]:
    """Load tensors, named as in the checkpoint, into the parameters of ``model``.

    Returns:
        Names of the parameters that got something.

    Raises:
        KeyError: there is no parameter for a tensor.
    """
    parameters: dict[str, Any] = dict(model.named_parameters())
    experts = {
        name: (parameter, expert, shard)
        for parameter, name, expert, shard in api.FusedMoE.make_expert_params_mapping(
            "gate_proj", "down_proj", "up_proj", num_experts
        )
    }
    stacks = STACKED + (JOINED if any(JOINED[0][1] in name for name in parameters) else ())
    loaded = set()
    for name, tensor in weights:
        if name.endswith(IGNORED_SUFFIXES):
            continue
        if ".mlp.experts." in name:
            prefix, _, rest = name.partition(".experts.")
            key = f"experts.{rest.rpartition('.')[0]}."
            target, expert, shard = experts[key]
            name = f"{prefix}.{target}{rest.rpartition('.')[2]}"
            parameters[name].weight_loader(parameters[name], tensor, name, shard_id=shard, expert_id=expert)
        elif (stacked := next((entry for entry in stacks if entry[0] in name), None)) is not None:
            name = name.replace(stacked[0], stacked[1])
            parameters[name].weight_loader(parameters[name], tensor, stacked[2])
        else:
            loader = getattr(parameters[name], "weight_loader", api.default_weight_loader)
            loader(parameters[name], tensor)
        loaded.add(name)
    return loaded
