"""A prefill by a library that knows no slots: states on their way in and out, padding, gates. Interpreted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qnext_kernels import force_backend, gated_delta_rule_prefill
from qnext_kernels.gated_delta_rule.flash_qla import without_empty
from qnext_kernels.gated_delta_rule.flashinfer import SMALLEST_DECAY, decay, one_token_each
from qnext_kernels.gated_delta_rule.packed_prefill import ChunkedPrefill, packed_prefill
from qnext_kernels.gated_delta_rule.reference import gating, l2_norm, recurrence
from qnext_kernels.gated_delta_rule.triton_packed import clear_skipped, load_states, normalized, save_states
from qnext_kernels.triton_support import ALIGNMENT
from tests.kernels.delta_rule_runs import SHAPES, Shape, random_gates, random_state, random_tokens
from tests.kernels.kernel_inputs import (
    assert_close,
    distinct_slots,
    memory,
    nan_pool,
    only_written,
    same_bits,
    start_offsets,
)
from tests.kernels.triton.interpreter import shuffled_programs

LENGTHS = (0, 1, 0, 3, 5, 2, 4)


def token_by_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor, query_start_loc: Tensor
) -> tuple[Tensor, Tensor]:
    """A :class:`ChunkedPrefill` by the definition; what no token decides is NaN."""
    assert initial.dtype == g.dtype == beta.dtype == torch.float32
    arguments = q, k, v, g, beta, initial, query_start_loc
    assert all(x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0 for x in arguments)
    group = v.shape[1] // q.shape[1]
    queries = (q.float() * q.shape[2] ** -0.5).repeat_interleave(group, dim=1)
    keys = k.float().repeat_interleave(group, dim=1)
    out, final = torch.full_like(v, torch.nan), torch.full_like(initial, torch.nan)
    for n in range(len(initial)):
        state = initial[n]
        for t in range(*query_start_loc[n : n + 2].tolist()):
            o, state = recurrence(queries[t], keys[t], v[t].float(), g[t], beta[t], state)
            out[t], final[n] = o, state
    return out, final


def unaligned(x: Tensor) -> Tensor:
    """``x`` [N] as a view that begins one element behind an aligned address."""
    return torch.cat([x[:1], x])[1:]


def filled_alone(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor, query_start_loc: Tensor
) -> tuple[Tensor, Tensor]:
    """The same by a library that takes no sequence without tokens."""
    filled, starts = without_empty(query_start_loc)
    assert (starts.diff() > 0).all()
    out, final = token_by_token(q, k, v, g, beta, initial[filled], starts)
    return out, initial.index_copy_(0, filled, final)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunked", [token_by_token, filled_alone])
def test_the_definition_on_packed_states_agrees_with_float64_on_slots(
    chunked: ChunkedPrefill, shape: Shape, dtype: torch.dtype
) -> None:
    tokens, gates = random_tokens(shape, sum(LENGTHS), dtype), random_gates(shape)
    pool, slots = nan_pool(12, shape.state, torch.float32), distinct_slots(len(LENGTHS), 12)
    known, offsets = torch.tensor([True, True, False, False, True, True, False]), start_offsets(LENGTHS, torch.int64)
    slots[3] = slots[6] = -1
    for slot in slots[(slots >= 0) & known]:
        pool[slot] = random_state(shape, torch.float32)
    truth_pool, before, bytes_before = pool.double(), pool.clone(), memory(pool).clone()
    with force_backend("reference"):
        truth = gated_delta_rule_prefill(*tokens.double(), *gates, truth_pool, slots, offsets, known)
    with shuffled_programs(0):
        out = packed_prefill(chunked, *tokens, *gates, pool, slots, unaligned(offsets), known)
    written = slots[(slots >= 0) & (offsets.diff() > 0)]
    # A term of an output has a query, a key written and a key read, which are rounded behind their norm.
    expected = {torch.float32: 8 * max(LENGTHS) + 2 * shape.key_dim}
    expected[dtype] = expected.get(dtype, 0) + 3
    assert out.dtype == dtype
    assert_close(out, truth, expected)
    assert not out[offsets[3] : offsets[4]].any()
    assert not out[offsets[6] :].any()
    assert_close(pool[written], truth_pool[written], expected)
    assert only_written(pool, before, bytes_before, written)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 128), (70, 2, 20), (3, 5, 33), (0, 2, 16)])
def test_heads_are_normalised_and_rounded_once(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    wide = torch.randn(shape[0], shape[1] + 2, shape[2] + 3).to(dtype)
    for x in (wide[:, 1:-1, 2:-1], wide.transpose(0, 1)[1:-1].transpose(0, 1)[:, :, ::2]):
        out = normalized(x)
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert_close(out, l2_norm(x.double()), {torch.float32: shape[2]})


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_without_tokens_nothing_is_written(lengths: Sequence[int]) -> None:
    shape, count = SHAPES[0], len(lengths)
    tokens, gates, pool = (
        random_tokens(shape, 0, torch.bfloat16),
        random_gates(shape),
        nan_pool(3, (4, 24, 16), torch.float32),
    )
    bytes_before = memory(pool).clone()
    slots, known = torch.arange(count, dtype=torch.int32), torch.zeros(count, dtype=torch.bool)
    out = packed_prefill(token_by_token, *tokens, *gates, pool, slots, start_offsets(lengths), known)
    assert out.shape == tokens.v.shape
    assert torch.equal(memory(pool), bytes_before)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_go_out_of_and_into_slots_and_nowhere_else(state_dtype: torch.dtype) -> None:
    # More elements than a program copies, and not a multiple of them.
    pool = nan_pool(6, (3, 40, 50), state_dtype)
    pool[:] = torch.randn(pool.shape)
    slots, known = torch.tensor([4, -1, 0, 2, 5]), torch.tensor([True, True, False, True, True])
    offsets, before, bytes_before = torch.tensor([0, 1, 2, 3, 3, 7]), pool.clone(), memory(pool).clone()
    packed = load_states(pool, slots, known)
    assert same_bits(packed[[0, 3, 4]], pool[[4, 2, 5]].float())
    assert not packed[[1, 2]].any()
    new = torch.randn(packed.shape)
    save_states(new, pool, slots, offsets)
    assert same_bits(pool[[4, 0, 5]], new[[0, 2, 4]].to(state_dtype))
    assert only_written(pool, before, bytes_before, torch.tensor([4, 0, 5]))
    out = torch.full((7, 3, 2000), torch.nan, dtype=state_dtype)
    clear_skipped(out, slots, offsets)
    assert not out[1].any()
    assert out[[0, 2, 3, 4, 5, 6]].isnan().all()


def test_only_sequences_with_tokens_are_left() -> None:
    for lengths in ([3], [0, 2, 0, 0, 1], [4, 1], [0, 5, 0]):
        offsets = start_offsets(lengths)
        filled, starts = without_empty(offsets)
        assert filled.tolist() == [n for n, length in enumerate(lengths) if length]
        assert torch.equal(starts, start_offsets([length for length in lengths if length]))
        assert starts.data_ptr() != offsets.data_ptr()


def test_a_decay_is_not_a_logarithm_and_has_one() -> None:
    a, gates = torch.tensor([[-3.0], [0.0], [1e4]]), (torch.zeros(1), torch.zeros(1))
    g, _ = gating(a, a, *gates)
    alpha = decay(g)
    assert torch.equal(alpha[:2], torch.exp(g[:2]))
    assert alpha[2] == torch.tensor(SMALLEST_DECAY)
    assert torch.isfinite(torch.log2(alpha)).all()


def test_tokens_become_sequences_of_one_token_without_a_copy_where_they_are_aligned() -> None:
    mixed, gates = torch.randn(5, 4, 128).bfloat16(), torch.randn(5, 3).bfloat16()
    q, k, v = mixed.split([1, 1, 2], dim=1)
    a, b = torch.randn(5, 16).bfloat16().chunk(2, dim=1)
    for view in (q, k, v, a, b):
        (one,) = one_token_each(view, *[view] * 4)[:1]
        assert one.data_ptr() == view.data_ptr()
        assert torch.equal(one[:, 0], view)
    copies = one_token_each(q, k, v, gates[:, 1:], gates.t()[:, :3])
    for copy, view in zip(copies[3:], (gates[:, 1:], gates.t()[:, :3]), strict=True):
        assert torch.equal(copy[:, 0], view)
        assert copy.data_ptr() % 16 == 0
        assert copy.stride(-1) == 1
