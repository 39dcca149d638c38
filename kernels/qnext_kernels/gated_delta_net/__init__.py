"""All that lies between the projections of a Gated DeltaNet layer.

    q, k, v ← causal_conv1d(q, k, v)      o ← gated_delta_rule(q, k, v, a, b)      out = gated_rms_norm(o, z)

Where C++ serves all three, a decode and a verify run as one kernel, which reads what the projections wrote where it
lies; where Triton does, a decode, and a verify as three launches that read it so. Otherwise, and in a prefill, they are
called one after the other. Either way what one of them leaves to the next is rounded to the dtype of ``qkvz``.

Common arguments:

    qkvz:        [T, H, 2 K + 2 G V], one float dtype: of every key head its q, its k, the v of its G value heads and
                 their z, as the checkpoint groups them (transformers' ``fix_query_key_value_ordering``)
    ba:          [T, H, 2 G], any float dtype: of every key head the b of its value heads and their a
    conv_weight: [D, W], any float dtype; D = 2 H K + HV V channels, those of all q, of all k and of all v
    A_log, dt_bias: [HV], norm_weight: [V], any float dtype; HV = H G
    eps:         of the output norm
    conv_state:  [slots, D, state_len] pool, any float dtype, any strides; written in place
    state:       [slots, HV, V, K] pool, any float dtype, dim 0 of any stride; written in place
    out:         [T, HV · V] in the dtype of ``qkvz``, contiguous, where the result is written; overlaps nothing else

The pools are those of ``causal_conv1d`` and ``gated_delta_rule``, whose promises hold here too.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qnext_kernels import causal_conv1d, gated_delta_rule, gated_norm
from qnext_kernels.causal_conv1d.grouping import ungrouped
from qnext_kernels.checks import expect_both_or_neither, expect_destination
from qnext_kernels.gated_delta_net import native
from qnext_kernels.gated_delta_net.checks import Steps, check_decode, check_layer, check_prefill, check_verify
from qnext_kernels.gated_delta_net.prepared import LayerWeights, PreparedLayer
from qnext_kernels.gated_delta_net.split import split_convolved, split_projections
from qnext_kernels.layouts import once_per_layout
from qnext_kernels.triton_support import TritonBackend

__all__ = ["gated_delta_net_decode", "gated_delta_net_prefill", "gated_delta_net_verify", "prepare_layer"]

PARTS = (causal_conv1d.operation, gated_delta_rule.operation, gated_norm.operation)
_rule_backend = once_per_layout(gated_delta_rule.select_backend)


def gated_delta_net_decode(
    qkvz: Tensor,
    ba: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    conv_state: Tensor,
    state: Tensor,
    slots: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Run one token a sequence, from the states in its slot to the states in its slot.

    Args:
        qkvz, ba, conv_weight, A_log, dt_bias, norm_weight, eps, conv_state, state, out: see the module, with T = N.
        slots: [N] int32 or int64; slot −1 is skipped and its outputs are zero.

    Returns:
        [N, HV · V] in the dtype of ``qkvz``; ``out`` where it is given.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; nothing has been written.
    """
    layer = (conv_weight, A_log, dt_bias, norm_weight)
    run = _decode_at_once(qkvz, ba, *layer, conv_state, state, slots)
    _check_out(out, qkvz, state)
    if run is not None:
        return run(qkvz, ba, *layer, eps, conv_state, state, slots, out=out)
    grouped_qkv, z, b, a = split_projections(qkvz, ba, state)
    convolution = causal_conv1d.operation.select(qkvz.device, qkvz.dtype)
    convolved = convolution.decode(ungrouped(grouped_qkv, state.shape[3]), conv_weight, conv_state, slots)
    q, k, v = split_convolved(convolved, state)
    rule = _rule_backend(q, v, a, state, "decode")
    return _normalise(rule.decode(q, k, v, a, b, A_log, dt_bias, state, slots), z, norm_weight, eps, out)


def gated_delta_net_prefill(
    qkvz: Tensor,
    ba: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    conv_state: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    has_initial_state: Tensor,
    snapshot_slots: Tensor | None = None,
    snapshot_lengths: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Run N sequences of any length, and leave the states behind them in their slots.

    Args:
        qkvz, ba, conv_weight, A_log, dt_bias, norm_weight, eps, conv_state, state, out: see the module.
        slots: [N] int32 or int64; slot −1 is skipped and its outputs are zero.
        query_start_loc: [N + 1] int32 or int64, where each sequence starts in the tokens.
        has_initial_state: [N] bool; where False a sequence starts from nothing.
        snapshot_slots, snapshot_lengths: of ``causal_conv1d_prefill`` and ``gated_delta_rule_prefill``.

    Returns:
        [T, HV · V] in the dtype of ``qkvz``; ``out`` where it is given.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; nothing has been written.
    """
    layer, where = (conv_weight, A_log, dt_bias, norm_weight), (slots, query_start_loc, has_initial_state)
    snapshots = expect_both_or_neither("snapshot_slots", snapshot_slots, "snapshot_lengths", snapshot_lengths)
    check_prefill(qkvz, ba, *layer, conv_state, state, *where, snapshot_slots, snapshot_lengths)
    _check_out(out, qkvz, state)
    grouped_qkv, z, b, a = split_projections(qkvz, ba, state)
    convolution = causal_conv1d.operation.select(qkvz.device, qkvz.dtype)
    convolved = convolution.prefill(grouped_qkv, conv_weight, conv_state, *where, snapshots, state.shape[3])
    q, k, v = split_convolved(convolved, state)
    features = () if snapshots is None else ("snapshots",)
    rule = _rule_backend(q, v, a, state, "prefill", features, len(slots))
    o = rule.prefill(q, k, v, a, b, A_log, dt_bias, state, *where, snapshots)
    return _normalise(o, z, norm_weight, eps, out)


def gated_delta_net_verify(
    qkvz: Tensor,
    ba: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    conv_state: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    num_accepted_tokens: Tensor,
    conv_step_state: Tensor | None = None,
    step_state: Tensor | None = None,
    step_rows: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Run a few tokens a sequence (the last accepted one and its drafts) so that any number can be taken back.

    Where a sequence starts and what is kept behind its tokens is said by ``causal_conv1d_verify`` and by
    ``gated_delta_rule_verify``.

    Args:
        qkvz, ba, conv_weight, A_log, dt_bias, norm_weight, eps, conv_state, state, out: see the module.
        slots: [N, S] int32 or int64 for the rule; the convolution has slot ``slots[n, 0]``. −1 is skipped.
        query_start_loc: [N + 1] int32 or int64, where each sequence starts in the tokens.
        num_accepted_tokens: [N] int32 or int64, from 1 to S and to ``state_len − W + 2``.
        conv_step_state: [rows, steps, D, W − 1] in the dtype of ``conv_state``, any strides, written in place.
        step_state: [rows, steps, HV, V, K], any float dtype, dims 0 and 1 of any stride, written in place.
        step_rows: [N] int32 or int64, different from each other; −1: only the outputs are computed. Both step pools
            and their rows are given or none.

    Returns:
        [T, HV · V] in the dtype of ``qkvz``; ``out`` where it is given.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; nothing has been written.
    """
    layer, offsets = (conv_weight, A_log, dt_bias, norm_weight), (query_start_loc, num_accepted_tokens)
    pools = (conv_step_state, step_state, step_rows)
    run = _verify_at_once(qkvz, ba, *layer, conv_state, state, slots, *offsets, *pools)
    _check_out(out, qkvz, state)
    steps = None if step_rows is None else (conv_step_state, step_state, step_rows)
    if run is not None:
        return run(qkvz, ba, *layer, eps, conv_state, state, slots, *offsets, steps, out)
    conv_steps, rule_steps = (None, None) if steps is None else ((steps[0], steps[2]), steps[1:])
    grouped_qkv, z, b, a = split_projections(qkvz, ba, state)
    mixed_qkv = ungrouped(grouped_qkv, state.shape[3])
    convolution = causal_conv1d.operation.select(qkvz.device, qkvz.dtype)
    convolved = convolution.verify(mixed_qkv, conv_weight, conv_state, slots[:, 0], *offsets, conv_steps)
    q, k, v = split_convolved(convolved, state)
    rule = _rule_backend(q, v, a, state, "verify", gated_delta_rule.step_features(step_state))
    o = rule.verify(q, k, v, a, b, A_log, dt_bias, state, slots, *offsets, rule_steps)
    return _normalise(o, z, norm_weight, eps, out)


def prepare_layer(
    qkvz: Tensor, ba: Tensor, weights: LayerWeights, eps: float, conv_state: Tensor, state: Tensor
) -> PreparedLayer | None:
    """One layer's calls of the kernel that runs all three operations, where that is one in C++; else None.

    Args:
        qkvz, ba: [T, H · (2 K + 2 G V)] and [T, H · 2 G], as the projections make them.
        weights: conv_weight, A_log, dt_bias and norm_weight; see the module.
        eps, conv_state, state: see the module.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    _, value_heads, value_dim, key_dim = state.shape
    key_heads = (qkvz.shape[1] - 2 * value_heads * value_dim) // (2 * key_dim)
    by_head = qkvz.unflatten(1, (key_heads, -1)), ba.unflatten(1, (key_heads, -1))
    check_layer(*by_head, *weights, conv_state, state)
    if _one_kernel(*by_head, weights, conv_state, state) is not _run_native:
        return None
    return PreparedLayer(qkvz, ba, key_heads, weights, eps, conv_state, state)


@once_per_layout
def _decode_at_once(
    qkvz: Tensor,
    ba: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    slots: Tensor,
) -> Callable[..., Tensor] | None:
    """Check the arguments of a decode; return :func:`_one_kernel` for them."""
    layer = (conv_weight, A_log, dt_bias, norm_weight)
    check_decode(qkvz, ba, *layer, conv_state, state, slots)
    return _one_kernel(qkvz, ba, layer, conv_state, state)


@once_per_layout
def _verify_at_once(
    qkvz: Tensor,
    ba: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    num_accepted_tokens: Tensor,
    conv_step_state: Tensor | None,
    step_state: Tensor | None,
    step_rows: Tensor | None,
) -> Callable[..., Tensor] | None:
    """Check the arguments of a verify; return :func:`_one_kernel` for them."""
    layer, offsets = (conv_weight, A_log, dt_bias, norm_weight), (query_start_loc, num_accepted_tokens)
    pools = (conv_step_state, step_state, step_rows)
    steps = check_verify(qkvz, ba, *layer, conv_state, state, slots, *offsets, pools)
    return _one_kernel(qkvz, ba, layer, conv_state, state, steps)


def _check_out(out: Tensor | None, qkvz: Tensor, state: Tensor) -> None:
    if out is not None:
        expect_destination("out", out, (qkvz.shape[0], state.shape[1] * state.shape[2]), qkvz.dtype)


def _normalise(o: Tensor, z: Tensor, weight: Tensor, eps: float, out: Tensor | None) -> Tensor:
    """Gated norm of the rule's outputs o [T, HV, V], into ``out`` [T, HV · V] or else in place; z [T, H, G, V]."""
    o = o.contiguous().view(*z.shape)
    norm = gated_norm.operation.select(o.device, o.dtype)
    norm.gated_rms_norm(o, z, weight, eps, o if out is None else out.view(*z.shape))
    return o.flatten(1) if out is None else out


def _one_kernel(
    qkvz: Tensor,
    ba: Tensor,
    layer: tuple[Tensor, ...],
    conv_state: Tensor,
    state: Tensor,
    steps: Steps | None = None,
) -> Callable[..., Tensor] | None:
    """What runs all three operations at once, where one backend serves them and has a kernel for these tensors."""
    serving = [part.select(qkvz.device, qkvz.dtype) for part in PARTS]
    if all(backend.name == "native" for backend in serving):
        return _run_native if native.reads(ba, layer, conv_state, state, steps) else None
    if all(isinstance(backend, TritonBackend) for backend in serving):
        from qnext_kernels.gated_delta_net.triton_fused import run_fused

        return run_fused
    return None


def _run_native(
    qkvz: Tensor,
    ba: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    conv_state: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor | None = None,
    accepted: Tensor | None = None,
    steps: Steps | None = None,
    out: Tensor | None = None,
) -> Tensor:
    layer = native.NativeLayer(conv_weight, A_log, dt_bias, norm_weight, eps, conv_state, state)
    if qkvz.stride(2) != 1:
        qkvz = qkvz.contiguous()
    if out is None:
        out = qkvz.new_empty(qkvz.shape[0], state.shape[1] * state.shape[2])
    (token, head, _), of_ba = qkvz.stride(), ba.stride()
    ba_strides = (of_ba[0], of_ba[1], of_ba[2])
    by_step = slots[:, None] if query_start_loc is None else slots
    layer.run(qkvz, (token, head), ba, ba_strides, qkvz.shape[1], by_step, query_start_loc, accepted, steps, out)
    return out
