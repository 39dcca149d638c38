"""Kernels of Qwen3-Next: torch in, torch out, and nothing of any engine.

One folder an operation. Each exports public functions whose docstrings give shapes, dtypes and what is written in
place; ``reference.py`` beside them is the readable definition, the other files are backends (``native.py``: C++ under
``csrc/``, ``cpu.py``: vectorised PyTorch, ``triton.py``: for GPUs). :mod:`qnext_kernels.dispatch` picks the backend of
a call and can say why it declined the others.
"""

from qnext_kernels.causal_conv1d import causal_conv1d_decode, causal_conv1d_prefill, causal_conv1d_verify
from qnext_kernels.decoder_layer import (
    ExpertsWeights,
    LinearWeight,
    linear_norm_experts,
    norm_heads,
    norm_linears,
)
from qnext_kernels.dispatch import OPERATIONS, explain, force_backend, selected_backends, without_kernels
from qnext_kernels.gated_attention import qk_norm_rope_gate, sigmoid_gate
from qnext_kernels.gated_delta_net import (
    gated_delta_net_decode,
    gated_delta_net_prefill,
    gated_delta_net_verify,
    prepare_layer,
)
from qnext_kernels.gated_delta_rule import (
    gated_delta_rule_decode,
    gated_delta_rule_prefill,
    gated_delta_rule_verify,
)
from qnext_kernels.gated_norm import gated_rms_norm
from qnext_kernels.linear import linear, pack_weight_, unpack_weight_
from qnext_kernels.memory import use_huge_pages
from qnext_kernels.moe import (
    experts,
    experts_fp8,
    experts_int4,
    pack_experts_,
    pack_experts_fp8_,
    pack_experts_int4_,
    silu_and_mul,
    topk_softmax,
    unpack_experts_,
    unpack_experts_fp8_,
    unpack_experts_int4_,
)
from qnext_kernels.paged_attention import paged_attention, store_kv
from qnext_kernels.rms_norm import rms_norm

__all__ = [
    "OPERATIONS",
    "ExpertsWeights",
    "LinearWeight",
    "causal_conv1d_decode",
    "causal_conv1d_prefill",
    "causal_conv1d_verify",
    "experts",
    "experts_fp8",
    "experts_int4",
    "explain",
    "force_backend",
    "gated_delta_net_decode",
    "gated_delta_net_prefill",
    "gated_delta_net_verify",
    "gated_delta_rule_decode",
    "gated_delta_rule_prefill",
    "gated_delta_rule_verify",
    "gated_rms_norm",
    "linear",
    "linear_norm_experts",
    "norm_heads",
    "norm_linears",
    "pack_experts_",
    "pack_experts_fp8_",
    "pack_experts_int4_",
    "pack_weight_",
    "paged_attention",
    "prepare_layer",
    "qk_norm_rope_gate",
    "rms_norm",
    "selected_backends",
    "sigmoid_gate",
    "silu_and_mul",
    "store_kv",
    "topk_softmax",
    "unpack_experts_",
    "unpack_experts_fp8_",
    "unpack_experts_int4_",
    "unpack_weight_",
    "use_huge_pages",
    "without_kernels",
]
