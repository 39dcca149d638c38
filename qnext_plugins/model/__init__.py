"""The Qwen3-Next model, written once and without an engine.

A block owns the mathematics: how projections are split, gated, convolved, normalised, routed and rotated. What differs
between engines (parallel linears, paged attention, the pool of recurrent states, experts) comes in through
:class:`qnext_plugins.model.port.Engine`.
"""

from qnext_plugins.model.config import CheckpointError, ConfigError, Qwen3NextConfig
from qnext_plugins.model.decoder_layer import DecoderLayer
from qnext_plugins.model.gated_attention import GatedAttention
from qnext_plugins.model.gated_delta_net import (
    CoreWeights,
    GatedDeltaNet,
    RecurrentBatch,
    Segment,
    StatePools,
    VerifySegment,
)
from qnext_plugins.model.gptq import STORED_IN_INT4, TRANSPOSED, as_compressed_tensors, from_gptq
from qnext_plugins.model.integers import IntegerWeights, integer_obstacle, packed_shapes
from qnext_plugins.model.mtp import MultiTokenPredictor
from qnext_plugins.model.norm import RMSNorm
from qnext_plugins.model.port import Engine
from qnext_plugins.model.sparse_moe import MLP, SparseMoe
from qnext_plugins.model.weights import (
    check_files,
    checked_weights,
    expected_shapes,
    fp8_shapes,
    is_block_fp8,
    modules_of,
    stored_names,
    weight_files,
)

__all__ = [
    "MLP",
    "STORED_IN_INT4",
    "TRANSPOSED",
    "CheckpointError",
    "ConfigError",
    "CoreWeights",
    "DecoderLayer",
    "Engine",
    "GatedAttention",
    "GatedDeltaNet",
    "IntegerWeights",
    "MultiTokenPredictor",
    "Qwen3NextConfig",
    "RMSNorm",
    "RecurrentBatch",
    "Segment",
    "SparseMoe",
    "StatePools",
    "VerifySegment",
    "as_compressed_tensors",
    "check_files",
    "checked_weights",
    "expected_shapes",
    "fp8_shapes",
    "from_gptq",
    "integer_obstacle",
    "is_block_fp8",
    "modules_of",
    "packed_shapes",
    "stored_names",
    "weight_files",
]
