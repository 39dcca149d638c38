"""Every vLLM symbol that the model side touches; no other module of ours but those named here imports vLLM.

(``config_hook``, ``host_kernels``, ``determinism``, ``block_copies`` and ``seeded_prefill`` say what they change, and
:func:`qnext_vllm.register` uses the registry.) A contract test walks through all of them and names the one that an
engine update broke.
"""

from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.ir.ops import fused_add_rms_norm, rms_norm
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
    is_conv_state_dim_first,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod, Fp8MoEMethod
from vllm.model_executor.layers.quantization.utils.fp8_utils import (
    create_fp8_scale_parameter,
    create_fp8_weight_parameter,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import (
    EagleModelMixin,
    HasInnerState,
    IsHybrid,
    MixtureOfExperts,
    SupportsEagle3,
    SupportsLoRA,
    SupportsPP,
)
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    BlockQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.gdn_attn import GDNAttentionBackend, GDNAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

__all__ = [
    "NULL_BLOCK_ID",
    "Attention",
    "AutoWeightsLoader",
    "BasevLLMParameter",
    "BlockQuantScaleParameter",
    "CPUAttentionBackend",
    "CPUAttentionBackendImpl",
    "ColumnParallelLinear",
    "CompressedTensorsConfig",
    "EagleModelMixin",
    "ForwardContext",
    "Fp8Config",
    "Fp8LinearMethod",
    "Fp8MoEMethod",
    "FusedMoEFactory",
    "FusedMoEMethodBase",
    "GDNAttentionBackend",
    "GDNAttentionMetadata",
    "GroupQuantScaleParameter",
    "HasInnerState",
    "IntermediateTensors",
    "IsHybrid",
    "LinearBase",
    "LinearMethodBase",
    "LogitsProcessor",
    "MambaAttentionBackendEnum",
    "MambaBase",
    "MambaStateCopyFuncCalculator",
    "MambaStateDtypeCalculator",
    "MambaStateShapeCalculator",
    "MergedColumnParallelLinear",
    "MixtureOfExperts",
    "PPMissingLayer",
    "PackedvLLMParameter",
    "ParallelLMHead",
    "QKVParallelLinear",
    "ReplicatedLinear",
    "RoutedExperts",
    "RowParallelLinear",
    "SupportsEagle3",
    "SupportsLoRA",
    "SupportsPP",
    "UnquantizedEmbeddingMethod",
    "UnquantizedFusedMoEMethod",
    "UnquantizedLinearMethod",
    "UnquantizedMoeBackend",
    "VllmConfig",
    "VocabParallelEmbedding",
    "WeightsMapper",
    "create_fp8_scale_parameter",
    "create_fp8_weight_parameter",
    "eager_break_during_capture",
    "extract_layer_index",
    "fused_add_rms_norm",
    "get_current_vllm_config",
    "get_forward_context",
    "get_pp_group",
    "get_rope",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "is_conv_state_dim_first",
    "is_layer_skipped",
    "make_empty_intermediate_tensors_factory",
    "make_layers",
    "maybe_prefix",
    "register_weight_loader_v2_supported_method",
    "rms_norm",
    "support_torch_compile",
]
