"""A verify by FlashInfer, which writes states by batch, not into slots: padding, ragged tokens, parts. Interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qnext_kernels.gated_delta_rule import padded_verify
from qnext_kernels.gated_delta_rule.flashinfer import FlashInferGatedDeltaRule
from qnext_kernels.gated_delta_rule.reference import ReferenceBackend
from qnext_kernels.gated_delta_rule.triton_packed import save_states
from tests.kernels import test_gated_delta_rule as of_any_backend
from tests.kernels.delta_rule_runs import MODEL_SHAPE, random_gates, random_tokens
from tests.kernels.kernel_inputs import (
    assert_close,
    distinct_slots,
    memory,
    nan_pool,
    nan_steps,
    only_written,
    same_bits,
    start_offsets,
)
from tests.kernels.triton.interpreter import shuffled_programs
from tests.kernels.verify_stand_in import stand_in

FLASHINFER, REFERENCE = FlashInferGatedDeltaRule(), ReferenceBackend()
BF16, FP32 = torch.bfloat16, torch.float32
LENGTHS = (3, 0, 1, 2, 3, 2)
SKIPPED, UNSAVED = 2, 3
"""In the batch: a sequence that starts from no slot, and one whose step row is −1."""


@pytest.fixture(autouse=True)
def served(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


def test_states_in_slots_agree_with_float64() -> None:
    of_any_backend.test_verify_agrees_with_float64("flashinfer", MODEL_SHAPE, BF16, FP32)


def test_states_in_a_step_pool_agree_with_float64() -> None:
    of_any_backend.test_verify_with_a_step_pool_agrees_with_float64("flashinfer", MODEL_SHAPE, BF16, FP32, FP32)


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_without_tokens_nothing_is_written(lengths: tuple[int, ...]) -> None:
    batch = Batch(columns=2, lengths=lengths, behind=0)
    bytes_before = memory(batch.pool).clone()
    assert batch.run(FLASHINFER, batch.pool).shape == (0, MODEL_SHAPE.value_heads, MODEL_SHAPE.value_dim)
    assert torch.equal(memory(batch.pool), bytes_before)


class Batch:
    """Sequences, one of them skipped, and tokens behind the last, as a CUDA graph pads a batch."""

    def __init__(self, columns: int, lengths: tuple[int, ...] = LENGTHS, behind: int = 2) -> None:
        self.offsets, count = start_offsets(lengths), len(lengths)
        self.tokens, self.gates = random_tokens(MODEL_SHAPE, sum(lengths) + behind, BF16), random_gates(MODEL_SHAPE)
        self.pool = nan_pool(count * columns + 2, MODEL_SHAPE.state, FP32, gap=64)
        self.slots = distinct_slots(count * columns, len(self.pool)).view(count, columns)
        self.accepted = torch.randint(1, columns + 1, (count,))
        self.pool[:] = torch.randn(self.pool.shape)
        if len(lengths) > SKIPPED:
            self.slots[SKIPPED, self.accepted[SKIPPED] - 1] = -1

    def run(
        self,
        backend: FlashInferGatedDeltaRule | ReferenceBackend,
        pool: Tensor,
        steps: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As on a GPU, where the public function does not see that there are tokens behind the last sequence."""
        tokens = self.tokens if backend is FLASHINFER else self.tokens.double()
        return backend.verify(*tokens, *self.gates, pool, self.slots, self.offsets, self.accepted, steps)


def roundings(steps: int) -> dict[torch.dtype, int]:
    return {FP32: 8 * steps + 2 * MODEL_SHAPE.key_dim}


@pytest.mark.parametrize("steps_first", [False, True])
def test_step_pools_of_any_stride_keep_what_no_token_wrote(steps_first: bool) -> None:
    batch, rows = Batch(columns=2), distinct_slots(len(LENGTHS), 8)
    rows[UNSAVED] = -1
    steps = nan_steps(8, 3, MODEL_SHAPE.state, FP32, steps_first=steps_first)
    steps[:] = torch.randn(steps.shape)
    before, bytes_before, truth = steps.clone(), memory(steps).clone(), steps.double()
    pool_before = memory(batch.pool).clone()
    expected = batch.run(REFERENCE, batch.pool.double(), (truth, rows))
    with shuffled_programs(0):
        out = batch.run(FLASHINFER, batch.pool, (steps, rows))
    assert_close(out, expected, roundings(3))
    assert not out[batch.offsets[SKIPPED] : batch.offsets[SKIPPED + 1]].any()
    assert not out[sum(LENGTHS) :].any()
    for n, (row, length) in enumerate(zip(rows.tolist(), LENGTHS, strict=True)):
        if n not in (SKIPPED, UNSAVED):
            assert_close(steps[row, :length], truth[row, :length], roundings(3))
            steps[row, :length] = before[row, :length]
    assert torch.equal(memory(steps), bytes_before)
    assert torch.equal(memory(batch.pool), pool_before)


def test_a_batch_in_parts_has_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(columns=3)
    whole_pool, before, bytes_before = batch.pool.clone(), batch.pool.clone(), memory(batch.pool).clone()
    whole = batch.run(FLASHINFER, whole_pool)
    states = 3 * batch.pool[0].numel()
    monkeypatch.setattr(padded_verify, "BUFFER", 4 * states)
    assert same_bits(batch.run(FLASHINFER, batch.pool), whole)
    assert same_bits(batch.pool, whole_pool)
    reached = (torch.arange(3) < batch.offsets.diff()[:, None]) & (batch.slots >= 0)
    reached[SKIPPED] = False
    assert only_written(batch.pool, before, bytes_before, batch.slots[reached])


def test_one_token_a_sequence_is_served_by_a_kernel_for_more() -> None:
    batch = Batch(columns=1, lengths=(1, 1, 1, 0))
    truth_pool, before, bytes_before = batch.pool.double(), batch.pool.clone(), memory(batch.pool).clone()
    expected = batch.run(REFERENCE, truth_pool)
    assert_close(batch.run(FLASHINFER, batch.pool), expected, roundings(1))
    written = batch.slots[[0, 1], 0]
    assert_close(batch.pool[written], truth_pool[written], roundings(1))
    assert only_written(batch.pool, before, bytes_before, written)


@pytest.mark.parametrize("state_dtype", [FP32, BF16])
def test_states_behind_every_token_go_into_slots_or_steps_and_nowhere_else(state_dtype: torch.dtype) -> None:
    # More elements than a program copies, and not a multiple of them; more steps in the buffer than are saved.
    packed, offsets = torch.randn(4, 3, 3, 40, 50), torch.tensor([0, 2, 2, 3, 5])
    slots = torch.tensor([[5, 1], [0, 2], [-1, 3], [-1, 7]])
    pool = nan_pool(9, (3, 40, 50), state_dtype)
    before, bytes_before = pool.clone(), memory(pool).clone()
    save_states(packed, pool, slots, offsets)
    assert same_bits(pool[[5, 1, 7]], packed[[0, 0, 3], [0, 1, 1]].to(state_dtype))
    assert only_written(pool, before, bytes_before, torch.tensor([5, 1, 7]))
    steps = nan_steps(6, 2, (3, 40, 50), state_dtype, steps_first=True)
    bytes_before = memory(steps).clone()
    save_states(packed, steps, torch.tensor([[4, 4], [0, 0], [-1, -1], [2, 2]]), offsets)
    assert same_bits(steps[[4, 2]], packed[[0, 3], :2].to(state_dtype))
    steps[[4, 2]] = torch.nan
    assert torch.equal(memory(steps), bytes_before)
