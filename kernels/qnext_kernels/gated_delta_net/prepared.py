"""Decode and verify of one layer on a CPU, without looking at the same weights and pools at every step.

A call by itself checks all of its arguments, which takes longer than a token of one sequence. Here those that stay are
checked once; the indices of each call are checked by the kernel.
"""

from __future__ import annotations

from torch import Tensor

from qnext_kernels.checks import INTEGERS, expect_destination, expect_dtype, expect_shape
from qnext_kernels.gated_delta_net.checks import check_decode, check_verify
from qnext_kernels.gated_delta_net.native import NativeLayer

LayerWeights = tuple[Tensor, Tensor, Tensor, Tensor]
"""conv_weight, A_log, dt_bias and norm_weight."""


class PreparedLayer:
    """One layer's weights and pools with projections of one width; what it was made of stays alive with it.

    Args:
        qkvz: [T, H · (2 K + 2 G V)], ba: [T, H · 2 G], of the calls to come: their dtypes and widths matter.
        key_heads: H.
        weights, eps, conv_state, state: of the module; the kernel reads them.
    """

    def __init__(
        self,
        qkvz: Tensor,
        ba: Tensor,
        key_heads: int,
        weights: LayerWeights,
        eps: float,
        conv_state: Tensor,
        state: Tensor,
    ) -> None:
        self._layer = (*weights, conv_state, state)
        self._native = NativeLayer(*weights, eps, conv_state, state)
        self._widths, self._dtypes, self._key_heads = (qkvz.shape[1], ba.shape[1]), (qkvz.dtype, ba.dtype), key_heads
        self._addresses = [tensor.data_ptr() for tensor in self._layer]
        self._out_width = state.shape[1] * state.shape[2]

    def is_of(self, qkvz: Tensor, ba: Tensor, weights: LayerWeights, conv_state: Tensor, state: Tensor) -> bool:
        """Whether it was made for these weights, pools and widths."""
        return (
            [tensor.data_ptr() for tensor in (*weights, conv_state, state)] == self._addresses
            and (qkvz.shape[1], ba.shape[1]) == self._widths
            and (qkvz.dtype, ba.dtype) == self._dtypes
            and state.shape == self._layer[-1].shape
            and conv_state.stride() == self._layer[-2].stride()
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the kernel reads and writes."""
        return (*self._native.tensors, *self._layer[-2:])

    def fields(self) -> tuple[float, ...]:
        """Those of the kernel's struct without tokens and sequences, for projections that are contiguous."""
        (qkvz_dtype, ba_dtype), heads = self._dtypes, self._key_heads
        qkvz_head, ba_head = (width // heads for width in self._widths)
        return self._native.fields(qkvz_dtype, qkvz_head, ba_dtype, ba_head, heads)

    def decode(self, qkvz: Tensor, ba: Tensor, slots: Tensor, out: Tensor | None) -> Tensor:
        """:func:`qnext_kernels.gated_delta_net_decode` of projections [T, ...] in two dimensions."""
        expect_shape("slots", slots, (qkvz.shape[0],))
        out = self._out(qkvz, out)
        if not self._run(qkvz, ba, slots[:, None], None, None, out):
            by_head = self._by_head(qkvz, ba)
            check_decode(*by_head, *self._layer, slots)
        return out

    def verify(
        self,
        qkvz: Tensor,
        ba: Tensor,
        slots: Tensor,
        query_start_loc: Tensor,
        num_accepted_tokens: Tensor,
        out: Tensor | None,
    ) -> Tensor:
        """:func:`qnext_kernels.gated_delta_net_verify` of the same, without step pools."""
        out = self._out(qkvz, out)
        where = (slots, query_start_loc, num_accepted_tokens)
        count = query_start_loc.shape[0] - 1
        expect_shape("slots", slots, (count, None))
        expect_shape("num_accepted_tokens", num_accepted_tokens, (count,))
        if not self._run(qkvz, ba, *where, out):
            by_head = self._by_head(qkvz, ba)
            check_verify(*by_head, *self._layer, *where, (None, None, None))
        return out

    def _out(self, qkvz: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            return qkvz.new_empty(qkvz.shape[0], self._out_width)
        expect_destination("out", out, (qkvz.shape[0], self._out_width), qkvz.dtype)
        return out

    def _run(
        self,
        qkvz: Tensor,
        ba: Tensor,
        slots: Tensor,
        query_start_loc: Tensor | None,
        accepted: Tensor | None,
        out: Tensor,
    ) -> bool:
        for name, index in (("slots", slots), ("query_start_loc", query_start_loc), ("num_accepted_tokens", accepted)):
            if index is not None:
                expect_dtype(name, index, INTEGERS)
        heads, qkvz = self._key_heads, qkvz if qkvz.stride(1) == 1 else qkvz.contiguous()
        (token, column), (qkvz_width, ba_width) = ba.stride(), self._widths
        return self._native.run(
            qkvz,
            (qkvz.stride(0), qkvz_width // heads),
            ba,
            (token, ba_width // heads * column, column),
            heads,
            slots,
            query_start_loc,
            accepted,
            None,
            out,
        )

    def _by_head(self, qkvz: Tensor, ba: Tensor) -> tuple[Tensor, Tensor]:
        return qkvz.unflatten(1, (self._key_heads, -1)), ba.unflatten(1, (self._key_heads, -1))
