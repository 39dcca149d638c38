"""Every SGLang symbol that the model side touches; no other module of ours but those named here imports SGLang.

(``serving``, ``hooks``, ``determinism`` and the modules of ``cpu`` say what they read or change, and
:func:`qnext_sglang.register` uses the registries.) A contract test walks through all of them and names the one that an
engine update broke.
"""

from sglang.srt.configs.hybrid_arch import hybrid_gdn_config
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.attention.hybrid_linear_attn_backend import HybridLinearAttnBackend, MambaAttnBackendBase
from sglang.srt.layers.attention.linear.utils import build_verify_intermediate_state_indices
from sglang.srt.layers.flashinfer_comm_fusion import flashinfer_allreduce_residual_rmsnorm
from sglang.srt.layers.layer_boundary.residual.add_norm import flashinfer_ar_fusion_applies
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.moe.topk import StandardTopKOutput, TopK
from sglang.srt.layers.moe.utils import RoutingMethodType, get_moe_runner_backend
from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase, LinearMethodBase
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod, Fp8MoEMethod
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedFusedMoEMethod,
    UnquantizedLinearMethod,
)
from sglang.srt.layers.quantization.utils import is_layer_skipped
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.radix_linear_attention import RadixLinearAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.runtime_context import get_exec, get_parallel, get_server_args
from sglang.srt.utils import add_prefix, get_bool_env_var

__all__ = [
    "CPU_QUANTIZATION_METHODS",
    "ColumnParallelLinear",
    "CompressedTensorsConfig",
    "CompressedTensorsWNA16",
    "ForwardBatch",
    "Fp8Config",
    "Fp8LinearMethod",
    "Fp8MoEMethod",
    "FusedMoE",
    "FusedMoEMethodBase",
    "HybridLinearAttnBackend",
    "LinearMethodBase",
    "LogitsProcessor",
    "MambaAttnBackendBase",
    "MergedColumnParallelLinear",
    "ParallelLMHead",
    "QKVParallelLinear",
    "RadixAttention",
    "RadixLinearAttention",
    "ReplicatedLinear",
    "RoutingMethodType",
    "RowParallelLinear",
    "StandardCombineInput",
    "StandardTopKOutput",
    "TopK",
    "UnquantizedEmbeddingMethod",
    "UnquantizedFusedMoEMethod",
    "UnquantizedLinearMethod",
    "VocabParallelEmbedding",
    "add_prefix",
    "build_verify_intermediate_state_indices",
    "default_weight_loader",
    "flashinfer_allreduce_residual_rmsnorm",
    "flashinfer_ar_fusion_applies",
    "get_attn_backend",
    "get_bool_env_var",
    "get_exec",
    "get_moe_runner_backend",
    "get_parallel",
    "get_rope",
    "get_server_args",
    "hybrid_gdn_config",
    "is_layer_skipped",
    "tensor_model_parallel_all_reduce",
]
