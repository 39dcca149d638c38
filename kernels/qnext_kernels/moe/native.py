"""The experts in C++ (``csrc/experts.cpp``), over weights as the checkpoint stores them or packed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from torch import Tensor

from qnext_kernels.checks import expect_indices
from qnext_kernels.linear import pack_weight_, unpack_weight_
from qnext_kernels.linear.native import packable
from qnext_kernels.moe import elementwise_native
from qnext_kernels.moe.cpu import CpuBackend
from qnext_kernels.native import DTYPES, NativeBackend
from qnext_kernels.rows import indices, packed_function


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
        return self.run(x, w13, w2, topk_weights, topk_ids, None, packed=False)

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

    def pack_experts_(self, *weights: Tensor, shared: tuple[Tensor, Tensor] | None = None) -> bool:
        """Pack gate, up and down projections apart; False where strides or sizes forbid it, or they are in FP8."""
        in_fp8 = len(weights) != 2  # with their scales
        weights += shared or ()
        if in_fp8 or not all(map(packable, weights)):
            return False
        for matrices in _matrices(*weights):
            pack_weight_(matrices)
        return True

    def unpack_experts_(self, *weights: Tensor, shared: tuple[Tensor, Tensor] | None = None) -> None:
        for matrices in _matrices(*weights, *(shared or ())):
            unpack_weight_(matrices)

    def experts_packed(self, x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return self.run(x, w13, w2, topk_weights, topk_ids, None, packed=True)

    def run(
        self,
        x: Tensor,
        w13: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared: tuple[Tensor, Tensor, Tensor] | None,
        *,
        packed: bool,
    ) -> Tensor:
        """Over contiguous weights, all of them packed or none; the gate may be strided."""
        x = x if x.stride()[1] == 1 else x.contiguous()
        topk_weights, topk_ids = topk_weights.contiguous(), topk_ids.contiguous()
        out = x.new_empty(x.shape)
        contiguous = () if shared is None else (*shared[:2], shared[2].contiguous())
        choice = (topk_weights.data_ptr(), *indices(topk_ids))
        weights, sizes = (w13, w2, packed, contiguous), (topk_ids.shape[1], x.shape[0])
        if not _kernel()(*experts_fields(*weights, *sizes, out.data_ptr(), x.data_ptr(), x.stride()[0], choice)):
            _expect_ids(topk_ids, w13)
        return out


def experts_fields(
    w13: Tensor,
    w2: Tensor,
    packed: bool,
    shared: Sequence[Tensor],
    top_k: int,
    tokens: int,
    out: int = 0,
    x: int = 0,
    x_token: int = 0,
    choice: tuple[int, int, int] = (0, 0, 0),
) -> tuple[int, ...]:
    """The fields of ``Experts``; what it reads or writes is the neighbouring operation's where it is 0.

    Args:
        shared: of the shared expert, whose gate is contiguous, or empty.
        out, x, x_token: addresses, and the stride between tokens.
        choice: where the weights lie, and the fields of ``Indices`` of the ids.
    """
    places, middle = (0, 0, 0), 0
    if shared:
        shared_w13, shared_w2, gate = shared
        places, middle = (shared_w13.data_ptr(), shared_w2.data_ptr(), gate.data_ptr()), shared_w2.shape[1]
    num_experts, hidden, width = w2.shape
    sizes = (DTYPES[w13.dtype], x_token, tokens, top_k, num_experts, hidden, width, middle, packed)
    return x, w13.data_ptr(), w2.data_ptr(), *choice, *places, out, *sizes


def _expect_ids(topk_ids: Tensor, w13: Tensor) -> None:
    expect_indices("topk_ids", topk_ids, -1, w13.shape[0])


_kernel = cache(lambda: packed_function("qnext_experts", "19q"))


def _matrices(*weights: Tensor) -> list[Tensor]:
    """Each w13 as its two matrices, each w2 as it is."""
    return [weight if n % 2 else weight.unflatten(-2, (2, -1)) for n, weight in enumerate(weights)]
