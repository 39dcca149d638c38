"""The experts in C++ (``csrc/experts.cpp``), over weights as the checkpoint stores them or packed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from torch import Tensor

from qnext_kernels.checks import expect_indices
from qnext_kernels.dispatch import BackendError
from qnext_kernels.integers import INT4, columns_of, group_of
from qnext_kernels.linear import pack_weight_, unpack_weight_
from qnext_kernels.linear.native import STORED, packable
from qnext_kernels.moe import elementwise_native
from qnext_kernels.moe.cpu import CpuBackend
from qnext_kernels.native import DTYPES, NativeBackend
from qnext_kernels.quantized import SharedWeights
from qnext_kernels.rows import address, indices, packed_function


class MoeNative(NativeBackend, CpuBackend):
    """Every product accumulates in float32 in one order: a token's bits do not depend on the rest of the batch."""

    name = "native"

    def topk_softmax(self, router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        return elementwise_native.topk_softmax(router_logits, top_k, renormalize)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        return elementwise_native.silu_and_mul(x)

    def experts(self, x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        if not (w13.is_contiguous() and w2.is_contiguous()):
            _expect_ids(topk_ids, w13)
            return super().experts(x, w13, w2, topk_weights, topk_ids)
        return self.run(x, w13, w2, topk_weights, topk_ids, (), packed=False)

    def experts_with_shared(
        self,
        x: Tensor,
        w13: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        if not all(weight.is_contiguous() for weight in (w13, w2, *shared[:2])):
            _expect_ids(topk_ids, w13)
            return super().experts_with_shared(x, w13, w2, topk_weights, topk_ids, shared)
        return self.run(x, w13, w2, topk_weights, topk_ids, shared, packed=False)

    def experts_scaled(
        self,
        x: Tensor,
        w13: Tensor,
        w13_scale: Tensor,
        w2: Tensor,
        w2_scale: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared: SharedWeights | None,
        quantize: bool,
    ) -> Tensor:
        weights = w13, w13_scale, w2, w2_scale
        stored = [weight for weight in weights + (shared or ())[:4] if weight is not None]
        if quantize or not all(weight.is_contiguous() for weight in stored):
            return super().experts_scaled(x, *weights, topk_weights, topk_ids, shared, quantize)
        scales = w13_scale, w2_scale
        return self.run(x, w13, w2, topk_weights, topk_ids, shared or (), scales, packed=False)

    def experts_scaled_packed(
        self,
        x: Tensor,
        w13: Tensor,
        w13_scale: Tensor,
        w2: Tensor,
        w2_scale: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared: SharedWeights | None,
        quantize: bool,
    ) -> Tensor:
        if quantize:
            raise BackendError(
                "quantize_activations: backend native does not over packed weights, expected False, got True"
            )
        scales = w13_scale.contiguous(), w2_scale.contiguous()
        return self.run(x, w13, w2, topk_weights, topk_ids, shared or (), scales, packed=True)

    def pack_experts_(self, *weights: Tensor, shared: tuple[Tensor, ...] | None = None) -> bool:
        """Pack gate, up and down projections apart, scales of groups too; False where strides or sizes forbid it."""
        stored = _matrices(weights, shared)
        if not all(packable(*each) for each in stored):
            return False
        for each in stored:
            pack_weight_(*each)
        return True

    def unpack_experts_(self, *weights: Tensor, shared: tuple[Tensor, ...] | None = None) -> None:
        for each in _matrices(weights, shared):
            unpack_weight_(*each)

    def experts_packed(self, x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return self.run(x, w13, w2, topk_weights, topk_ids, (), packed=True)

    def run(
        self,
        x: Tensor,
        w13: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared: Sequence[Tensor | None],
        scales: Sequence[Tensor] = (),
        *,
        packed: bool,
    ) -> Tensor:
        """Over contiguous weights, all packed or none; the gate may be strided.

        Args:
            shared: empty, or of the shared expert as ``experts`` takes it, or with what scales it has.
            scales: empty, or those of ``w13`` and ``w2``.
        """
        x = x if x.stride()[1] == 1 else x.contiguous()
        topk_weights, topk_ids = topk_weights.contiguous(), topk_ids.contiguous()
        out = x.new_empty(x.shape)
        contiguous = contiguous_gate(shared)
        choice = (topk_weights.data_ptr(), *indices(topk_ids))
        weights, sizes = (w13, w2, scales, packed, contiguous), (topk_ids.shape[1], x.shape[0], DTYPES[x.dtype])
        if not _kernel()(*experts_fields(*weights, *sizes, out.data_ptr(), x.data_ptr(), x.stride()[0], choice)):
            _expect_ids(topk_ids, w13)
        return out


def experts_fields(
    w13: Tensor,
    w2: Tensor,
    scales: Sequence[Tensor],
    packed: bool,
    shared: Sequence[Tensor | None],
    top_k: int,
    tokens: int,
    dtype: int,
    out: int = 0,
    x: int = 0,
    x_token: int = 0,
    choice: tuple[int, int, int] = (0, 0, 0),
) -> tuple[int, ...]:
    """The fields of ``Experts``; what it reads or writes is the neighbouring operation's where it is 0.

    Args:
        scales, shared: of :meth:`MoeNative.run`, contiguous.
        dtype: of the tokens, as in ``DTYPES``.
        out, x, x_token: addresses, and the stride between tokens.
        choice: where the weights lie, and the fields of ``Indices`` of the ids.
    """
    w13_scale, w2_scale = scales or (None, None)
    both: Sequence[Tensor | None] = (None,) * 5
    middle, stored = 0, STORED[w2.dtype]
    shared_stored = stored
    if shared:
        both = shared if len(shared) == len(both) else (shared[0], None, shared[1], None, shared[2])
        middle, shared_stored = columns_of(both[2]), STORED[both[2].dtype]  # type: ignore[arg-type, union-attr]
    num_experts, hidden, _ = w2.shape
    dtypes, group = (dtype, stored, shared_stored), group_of(w2, w2_scale)
    sizes = (x_token, tokens, top_k, num_experts, hidden, columns_of(w2), middle, group, packed)
    return x, *map(address, (w13, w13_scale, w2, w2_scale)), *choice, *map(address, both), out, *dtypes, *sizes


def contiguous_gate(shared: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """A shared expert, or none, with its gate, the last, as the kernel reads it."""
    return (*shared[:-1], shared[-1].contiguous()) if shared else ()  # type: ignore[union-attr]


def _expect_ids(topk_ids: Tensor, w13: Tensor) -> None:
    expect_indices("topk_ids", topk_ids, -1, w13.shape[0])


_kernel = cache(lambda: packed_function("qnext_experts", "26q"))


def _matrices(routed: tuple[Tensor, ...], shared: tuple[Tensor, ...] | None) -> list[tuple[Tensor, ...]]:
    """What is packed: each w13 as its two matrices, each w2 as it is, and their scales if they are in groups."""
    routed = routed if len(routed) == 2 or routed[0].dtype == INT4 else routed[::2]
    stored = []
    for weights in (routed, shared or ()):
        each = len(weights) // 2
        if each:
            stored += [tuple(x.unflatten(-2, (2, -1)) for x in weights[:each]), weights[each:]]
    return stored
