"""What the model needs from an engine, and nothing more.

Every linear is a module that maps [T, in] to [T, out of this rank]. Parameters that the engine makes carry whatever it
needs to load and shard them; the model only names them as the checkpoint does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from qnext_kernels import ExpertsWeights, LinearWeight
from qnext_plugins.model.config import Qwen3NextConfig

if TYPE_CHECKING:
    from qnext_plugins.model.gated_delta_net import CoreWeights
    from qnext_plugins.model.norm import RMSNorm
    from qnext_plugins.model.sparse_moe import MLP


class RecurrentCore(Protocol):
    """The part of a Gated DeltaNet layer that touches the engine's pool of recurrent states."""

    def __call__(self, qkvz: Tensor, ba: Tensor, weights: CoreWeights) -> Tensor:
        """Run :func:`qnext_plugins.model.gated_delta_net.gated_delta_net_core` on this batch and this layer's states.

        Args:
            qkvz: [T, 2·key_dim + 2·value_dim of this rank], of ``in_proj_qkvz``.
            ba: [T, 2·HV of this rank], of ``in_proj_ba``.
            weights: of this layer.

        Returns:
            [T, value_dim of this rank]; rows of padded tokens are zero.
        """


class PagedAttention(Protocol):
    """Causal attention over the engine's paged cache, which it also fills."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map q [T, heads·head_dim], k and v [T, kv_heads·head_dim] of this rank to [T, heads·head_dim]."""


class Experts(Protocol):
    """The routed experts, spread over the ranks as the engine likes."""

    def __call__(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        """Route by :func:`qnext_kernels.topk_softmax`, add the shared expert, sum over the ranks.

        Args:
            hidden_states: [T, hidden].
            router_logits: [T, experts].

        Returns:
            [T, hidden].
        """


class Engine(Protocol):
    """Builds the parts of the model that belong to the engine."""

    @property
    def tensor_parallel_size(self) -> int:
        """Number of ranks over which heads and intermediate dimensions are split."""

    def column_linear(self, input_size: int, output_size: int, *, prefix: str) -> nn.Module:
        """A linear whose output dimension is split over the ranks, in order."""

    def joined_column_linear(self, input_size: int, output_sizes: tuple[int, ...], *, prefix: str) -> nn.Module | None:
        """Such linears of one input as one, or None where they are better apart.

        A rank's output is its part of each, side by side, in order.
        """

    def gate_up_linear(self, input_size: int, intermediate_size: int, *, prefix: str) -> nn.Module:
        """Checkpoint's ``gate_proj`` and ``up_proj`` as one linear; a rank's output is its gate, then its up part."""

    def qkv_linear(self, config: Qwen3NextConfig, *, prefix: str) -> nn.Module:
        """Checkpoint's ``q_proj`` (a query and a gate a head), ``k_proj`` and ``v_proj`` as one linear.

        A rank's output is its heads' queries and gates, then its keys, then its values.
        """

    def row_linear(
        self, input_size: int, output_size: int, *, reduce: bool, bias: bool = False, prefix: str
    ) -> nn.Module:
        """A linear whose input dimension is split over the ranks; ``reduce``: sum the ranks' results."""

    def replicated_linear(self, input_size: int, output_size: int, *, quantized: bool, prefix: str) -> nn.Module:
        """A linear that every rank holds whole; ``quantized``: as the checkpoint's quantization says."""

    def norm(self, size: int, eps: float) -> RMSNorm:
        """The zero-centred norm of the residual stream, [T, size].

        With a residual its input is the result of a ``row_linear`` that reduces, or of the experts: an engine may leave
        the sum over the ranks to it.
        """

    def conv_weight(self, segments: tuple[int, ...], kernel_size: int) -> nn.Parameter:
        """A parameter [Σ segments of this rank, 1, kernel_size], each segment split over the ranks."""

    def head_parameter(self, num_heads: int) -> nn.Parameter:
        """A float32 parameter [num_heads of this rank], split over the ranks."""

    def cos_sin(self, config: Qwen3NextConfig) -> Tensor:
        """The rotary table [max_position, rotary_dim], cosines then sines, with the checkpoint's scaling."""

    def attention(self, num_heads: int, num_kv_heads: int, head_dim: int, *, prefix: str) -> PagedAttention:
        """Paged attention for this rank's heads, scaled by 1/√head_dim."""

    def recurrent_core(self, config: Qwen3NextConfig, *, prefix: str) -> RecurrentCore:
        """The recurrent states of the layer ``prefix``."""

    def experts(self, config: Qwen3NextConfig, shared_expert: MLP | None, *, prefix: str) -> Experts:
        """The routed experts of a layer, and what calls the shared one."""

    def linear_weight(self, linear: nn.Module) -> LinearWeight | None:
        """What :func:`qnext_kernels.linear` computes in this linear's place, or None where it must be called."""

    def experts_weights(self, experts: Experts) -> ExpertsWeights | None:
        """What the kernels route to and compute in the place of these experts, or None where they must be called."""
