"""The Gated DeltaNet backend over SGLang's metadata and pools: eager batches, and a CUDA graph's on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.kernels.ops.attention.fla.chunk_delta_h import CHUNK_SIZE as SGLANG_CHUNK_SIZE
from sglang.srt.configs.qwen3_next import Qwen3NextConfig
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.runtime_context import get_context
from torch import Tensor

from qnext_kernels.gated_delta_rule import CHUNK_SIZE
from qnext_plugins.model import RecurrentBatch
from qnext_sglang.cpu.attention import CpuAttentionBackend
from qnext_sglang.cpu.gated_delta_net import CpuGatedDeltaNetBackend, CpuHybridBackend
from qnext_sglang.hooks import _attention
from tests.sglang.recurrent_runs import (
    DRAFT_TOKENS,
    FULL_LAYERS,
    LINEAR_LAYERS,
    SLOTS,
    Inputs,
    Tracked,
    backend,
    decode_batch,
    forward,
    forward_batch,
    hybrid,
    inputs,
    prefill_batch,
    run,
    runner,
    states,
    step_states,
    verify_batch,
)

MAX_BATCH = 4


@pytest.fixture(scope="module", autouse=True)
def configured() -> Iterator[None]:
    """A process that has published its configuration, with SGLang's chunk size for this model."""
    with get_context().override_server_args(_mamba_cache_chunk_size=64):
        yield


def equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def at(pools: tuple[Tensor, ...], slots: Tensor | list[int] | int) -> tuple[Tensor, ...]:
    index = torch.as_tensor(slots).long()
    return tuple(pool[index] for pool in pools)


def slots_of(requests: list[int]) -> Tensor:
    return SLOTS[requests]


def untouched(before: tuple[Tensor, ...], after: tuple[Tensor, ...], but: Tensor | list[int]) -> bool:
    others = torch.ones(len(before[0]), dtype=torch.bool)
    others[torch.as_tensor(but).long()] = False
    return equal(tuple(pool[others] for pool in before), tuple(pool[others] for pool in after))


def decodes(on: CpuGatedDeltaNetBackend, requests: list[int], x: Inputs, steps: int) -> list[Tensor]:
    """The first ``steps`` of each request's DRAFT_TOKENS tokens, one batch after the other."""
    rows = torch.arange(len(requests)) * DRAFT_TOKENS
    return [run(on, decode_batch(requests), x[rows + step]) for step in range(steps)]


class TestDecode:
    def test_each_sequence_runs_in_its_requests_slot(self) -> None:
        together, requests, x = backend(), [4, 1, 3], inputs(3, seed=2)
        before = states(together)
        out = run(together, decode_batch(requests), x)
        assert together.batch.prefill is None
        assert together.batch.verify is None
        assert untouched(before, states(together), slots_of(requests))
        for row, request in enumerate(requests):
            alone = backend()
            assert torch.equal(out[row], run(alone, decode_batch([request]), x[row : row + 1])[0])
            assert equal(at(states(together), SLOTS[request]), at(states(alone), SLOTS[request]))

    def test_layer_has_states_of_its_own(self) -> None:
        one, x = backend(), inputs(2, seed=3)
        before = [states(one, layer_id) for layer_id in LINEAR_LAYERS]
        run(one, decode_batch([1, 2]), x, layer_id=LINEAR_LAYERS[1])
        assert equal(states(one, LINEAR_LAYERS[0]), before[0])
        assert not equal(states(one, LINEAR_LAYERS[1]), before[1])

    @pytest.mark.parametrize("mask", [[True, False, True], [False] * 3, [True] * 3])
    def test_tracked_sequences_leave_their_state_in_a_further_slot(self, mask: list[bool]) -> None:
        one, requests, tracks = backend(), [4, 1, 3], [15, 16, 17]
        batch = decode_batch(requests, mamba_track_mask=torch.tensor(mask), mamba_track_indices=torch.tensor(tracks))
        before = states(one)
        run(one, batch, inputs(3, seed=2))
        after = states(one)
        for request, track, tracked in zip(requests, tracks, mask, strict=True):
            assert equal(at(after, track), at(after, SLOTS[request]) if tracked else at(before, track))
        assert untouched(before, after, [*slots_of(requests).tolist(), *tracks])

    def test_decode_that_is_labelled_a_prefill_is_a_decode(self) -> None:
        relabelled, plain, x = backend(), backend(), inputs(2, seed=4)
        batch = prefill_batch([1, 2], [1, 1], [9, 9])
        batch._original_forward_mode = ForwardMode.DECODE
        assert torch.equal(run(relabelled, batch, x), run(plain, decode_batch([1, 2]), x))
        assert relabelled.batch.prefill is None
        assert equal(states(relabelled), states(plain))


class TestPrefill:
    def test_sequence_does_not_see_the_others(self) -> None:
        together, requests, lengths, prefixes = backend(), [2, 5, 1], [70, 1, 5], [0, 64, 128]
        x, before = inputs(sum(lengths), seed=5), states(together)
        out = run(together, prefill_batch(requests, lengths, prefixes), x)
        assert untouched(before, states(together), slots_of(requests))
        start = 0
        for request, length, prefix in zip(requests, lengths, prefixes, strict=True):
            alone, tokens = backend(), slice(start, start + length)
            assert torch.equal(out[tokens], run(alone, prefill_batch([request], [length], [prefix]), x[tokens]))
            assert equal(at(states(together), SLOTS[request]), at(states(alone), SLOTS[request]))
            start += length

    def test_prefill_behind_a_prefix_continues_it(self) -> None:
        whole, parts, x = backend(), backend(), inputs(100, seed=6)
        out = run(whole, prefill_batch([3], [100], [0]), x)
        first = run(parts, prefill_batch([3], [64], [0]), x[:64])
        rest = run(parts, prefill_batch([3], [36], [64]), x[64:])
        assert torch.equal(out, torch.cat([first, rest]))
        assert equal(states(whole), states(parts))

    def test_without_a_prefix_nothing_of_the_slots_former_state_is_left(self) -> None:
        clean, used, x = backend(), backend(), inputs(10, seed=7)
        run(used, decode_batch([3]), inputs(1, seed=8))
        batch = prefill_batch([3], [10], [0])
        assert torch.equal(run(clean, batch, x), run(used, batch, x))
        assert equal(states(clean), states(used))

    @pytest.mark.parametrize("mirrored", [True, False])
    # SGLang asks for one token more where it wants the last whole chunk of a longer prefill.
    @pytest.mark.parametrize("one_more", [0, 1])
    def test_snapshot_is_the_state_of_a_shorter_prefill(self, mirrored: bool, one_more: int) -> None:
        one, requests, lengths, prefixes = backend(), [2, 5, 1, 4], [150, 70, 65, 130], [0, 64, 0, 128]
        behind, tracks = [128, 64, 64, 0], [15, 16, 17, 18]
        mask = [True, True, True, False]
        ends = [prefix + length + one_more for prefix, length in zip(prefixes, behind, strict=True)]
        batch = prefill_batch(requests, lengths, prefixes, Tracked(mask, ends, tracks, mirrored))
        x, before = inputs(sum(lengths), seed=9), states(one)
        run(one, batch, x)
        after, start = states(one), 0
        for request, length, prefix, short, track, tracked in zip(
            requests, lengths, prefixes, behind, tracks, mask, strict=True
        ):
            alone = backend()
            if tracked:
                run(alone, prefill_batch([request], [short], [prefix]), x[start : start + short])
                assert equal(at(after, track), at(states(alone), SLOTS[request]))
            start += length
        assert untouched(before, after, [*slots_of(requests).tolist(), *tracks[:3]])

    def test_snapshots_change_neither_outputs_nor_states(self) -> None:
        tracked, plain, x = backend(), backend(), inputs(215, seed=10)
        snapshots = Tracked([True, True], [128, 64], [15, 16])
        out = run(tracked, prefill_batch([2, 5], [150, 65], [0, 0], snapshots), x)
        assert torch.equal(out, run(plain, prefill_batch([2, 5], [150, 65], [0, 0]), x))
        assert untouched(states(plain), states(tracked), [15, 16])

    @pytest.mark.parametrize("mirrored", [True, False])
    def test_nothing_tracked_leaves_no_snapshot(self, mirrored: bool) -> None:
        one = backend()
        before = states(one)
        nothing = Tracked([False, False], [0, 999], [15, -7], mirrored)
        run(one, prefill_batch([2, 5], [70, 66], [0, 0], nothing), inputs(136, seed=11))
        assert untouched(before, states(one), slots_of([2, 5]))


class TestVerify:
    REQUESTS: tuple[int, ...] = (5, 2, 6)

    @pytest.fixture
    def x(self) -> Inputs:
        return inputs(len(self.REQUESTS) * DRAFT_TOKENS, seed=12)

    def test_outputs_are_those_of_decodes(self, x: Inputs) -> None:
        requests = list(self.REQUESTS)
        out = run(backend(), verify_batch(requests), x).view(len(requests), DRAFT_TOKENS, -1)
        for step, expected in enumerate(decodes(backend(), requests, x, DRAFT_TOKENS)):
            assert torch.equal(out[:, step], expected.flatten(1))

    def test_pools_are_untouched_and_steps_hold_the_states_of_decodes(self, x: Inputs) -> None:
        verified, requests = backend(), list(self.REQUESTS)
        before, rows = states(verified), torch.arange(len(requests))
        run(verified, verify_batch(requests), x)
        assert equal(states(verified), before)
        for step in range(DRAFT_TOKENS):
            decoded = backend()
            decodes(decoded, requests, x, step + 1)
            behind = tuple(pool[rows, step] for pool in step_states(verified))
            assert equal(behind, at(states(decoded), slots_of(requests)))

    @pytest.mark.parametrize("accepted", [[1, 1, 1], [3, 3, 3], [2, 1, 3]])
    def test_commit_equals_decodes_of_the_accepted_tokens(self, x: Inputs, accepted: list[int]) -> None:
        verified, requests = backend(), list(self.REQUESTS)
        before = states(verified)
        run(verified, verify_batch(requests), x)
        commit(verified, accepted)
        assert untouched(before, states(verified), slots_of(requests))
        for request, count, row in zip(requests, accepted, range(len(requests)), strict=True):
            decoded = backend()
            decodes(decoded, [request], x[slice(row * DRAFT_TOKENS, None)], count)
            assert equal(at(states(verified), SLOTS[request]), at(states(decoded), SLOTS[request]))

    def test_next_batch_continues_from_the_committed_states(self, x: Inputs) -> None:
        verified, decoded, requests = backend(), backend(), list(self.REQUESTS)
        run(verified, verify_batch(requests), x)
        commit(verified, [2, 2, 2])
        decodes(decoded, requests, x, 2)
        y = inputs(3, seed=13)
        assert torch.equal(run(verified, decode_batch(requests), y), run(decoded, decode_batch(requests), y))

    def test_tracked_step_goes_to_a_further_slot(self, x: Inputs) -> None:
        verified, requests, tracks = backend(), list(self.REQUESTS), [15, 16, 17]
        before = states(verified)
        run(verified, verify_batch(requests), x)
        commit(verified, [3, 2, 1], tracks, [1, -1, 0])
        after = states(verified)
        for row, (request, track, count) in enumerate(zip(requests, tracks, [2, 0, 1], strict=True)):
            decoded = backend()
            if count:
                decodes(decoded, [request], x[slice(row * DRAFT_TOKENS, None)], count)
                assert equal(at(after, track), at(states(decoded), SLOTS[request]))
            else:
                assert equal(at(after, track), at(before, track))

    def test_every_layer_is_committed(self, x: Inputs) -> None:
        verified, batch = backend(), verify_batch(list(self.REQUESTS))
        for layer_id in LINEAR_LAYERS:
            run(verified, batch, x, layer_id)
        commit(verified, [2, 2, 2])
        for layer_id in LINEAR_LAYERS:
            behind = tuple(pool[:3, 1] for pool in step_states(verified, layer_id))
            assert equal(at(states(verified, layer_id), slots_of(list(self.REQUESTS))), behind)


def commit(
    verified: CpuGatedDeltaNetBackend,
    accepted: list[int],
    tracks: list[int] | None = None,
    track_steps: list[int] | None = None,
) -> None:
    hybrid(verified).update_mamba_state_after_mtp_verify(
        last_correct_step_indices=torch.tensor(accepted) - 1,
        mamba_track_indices=None if tracks is None else torch.tensor(tracks),
        mamba_steps_to_track=None if track_steps is None else torch.tensor(track_steps),
        model=None,
    )


class TestNothingToDo:
    def test_idle_rank_runs_no_sequence(self) -> None:
        one = backend()
        before = states(one)
        assert run(one, forward_batch(ForwardMode.IDLE, [], 0), inputs(0, seed=1)).shape[0] == 0
        assert one.batch == RecurrentBatch()
        assert equal(states(one), before)

    def test_draft_extend_runs_no_sequence(self) -> None:
        one = backend()
        one.init_forward_metadata(forward_batch(ForwardMode.DRAFT_EXTEND_V2, [1, 2], 6))
        assert one.batch == RecurrentBatch()

    def test_batch_before_leaves_nothing_behind(self) -> None:
        one = backend()
        run(one, verify_batch([1, 2]), inputs(2 * DRAFT_TOKENS, seed=1))
        one.init_forward_metadata(forward_batch(ForwardMode.IDLE, [], 0))
        assert one.batch == RecurrentBatch()


def tensors(batch: RecurrentBatch) -> list[Tensor]:
    segments = [segment for segment in vars(batch).values() if segment is not None]
    return [value for segment in segments for value in vars(segment).values() if isinstance(value, Tensor)]


def graph_batch(mode: ForwardMode, requests: list[int], padding: int = 0) -> ForwardBatch:
    """A batch in a graph's static buffers: the last ``padding`` requests are whatever was there before."""
    make = decode_batch if mode.is_decode() else verify_batch
    batch = make(requests + [6] * padding)
    batch.num_padding = padding  # type: ignore[attr-defined]
    return batch


@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.TARGET_VERIFY], ids=lambda mode: mode.name)
class TestGraph:
    @pytest.fixture
    def graph(self) -> CpuGatedDeltaNetBackend:
        one = backend()
        one.init_cuda_graph_state(MAX_BATCH, MAX_BATCH * DRAFT_TOKENS)
        return one

    @staticmethod
    def capture(graph: CpuGatedDeltaNetBackend, mode: ForwardMode, size: int) -> RecurrentBatch:
        """What a graph of ``size`` sequences records; SGLang captures with requests of padding."""
        graph.init_forward_metadata_out_graph(graph_batch(mode, [0] * size), in_capture=True)
        return graph.batch

    @pytest.mark.parametrize("size", [1, 3, MAX_BATCH])
    def test_capture_holds_only_views_of_static_buffers(
        self, graph: CpuGatedDeltaNetBackend, mode: ForwardMode, size: int
    ) -> None:
        held = tensors(self.capture(graph, mode, size))
        static = [
            graph.state_indices_list[size - 1],
            graph.query_start_loc_list[size - 1],
            graph.verify_rows,
            graph._one_accepted,
        ]
        assert len(held) == (1 if mode.is_decode() else 4)
        assert {tensor.data_ptr() for tensor in held} <= {buffer.data_ptr() for buffer in static}

    @pytest.mark.parametrize("padding", [0, 1, 2])
    def test_replay_changes_what_was_captured(
        self, graph: CpuGatedDeltaNetBackend, mode: ForwardMode, padding: int
    ) -> None:
        captured = self.capture(graph, mode, MAX_BATCH)
        requests = [3, 1, 4, 2][: MAX_BATCH - padding]
        graph.init_forward_metadata_out_graph(graph_batch(mode, requests, padding))
        slots = slots_of(requests).tolist() + [-1] * padding
        if captured.decode is not None:
            assert captured.decode.slots.tolist() == slots
        if (verify := captured.verify) is not None:
            assert verify.slots.tolist() == [[slot] for slot in slots]
            starts = [min(row, len(requests)) * DRAFT_TOKENS for row in range(MAX_BATCH + 1)]
            assert verify.query_start_loc.tolist() == starts
            assert verify.num_accepted_tokens.tolist() == [1] * MAX_BATCH
            assert verify.step_rows is not None
            assert verify.step_rows.tolist() == list(range(MAX_BATCH))
        assert [tensor.data_ptr() for tensor in tensors(graph.batch)] == [t.data_ptr() for t in tensors(captured)]

    def test_graphs_of_other_sizes_are_left_alone(self, graph: CpuGatedDeltaNetBackend, mode: ForwardMode) -> None:
        small = self.capture(graph, mode, 2)
        graph.init_forward_metadata_out_graph(graph_batch(mode, [5, 1]))
        before = [tensor.clone() for tensor in tensors(small)]
        self.capture(graph, mode, MAX_BATCH)
        graph.init_forward_metadata_out_graph(graph_batch(mode, [3, 1, 4, 2]))
        assert equal(tuple(tensors(small)), tuple(before))

    @pytest.mark.parametrize("padding", [0, 1, 2])
    def test_replay_equals_the_eager_batch(
        self, graph: CpuGatedDeltaNetBackend, mode: ForwardMode, padding: int
    ) -> None:
        eager, requests = backend(), [3, 1, 4, 2][: MAX_BATCH - padding]
        captured = self.capture(graph, mode, MAX_BATCH)
        replayed = graph_batch(mode, requests, padding)
        graph.init_forward_metadata_out_graph(replayed)
        graph.forward_metadata.qnext_batch = captured
        each = 1 if mode.is_decode() else DRAFT_TOKENS
        real = len(requests) * each
        # On a CPU, a verify refuses tokens of no sequence.
        x = inputs(MAX_BATCH if mode.is_decode() else real, seed=14)
        out = forward(graph, replayed, x)
        assert torch.equal(out[:real], run(eager, graph_batch(mode, requests), x[:real]))
        assert not out[real:].any()
        assert equal(states(graph), states(eager))
        assert equal(step_states(graph), step_states(eager))


def test_commit_behind_a_padded_replay_equals_the_eager_one() -> None:
    replayed, eager, requests = backend(), backend(), [3, 1]
    replayed.init_cuda_graph_state(MAX_BATCH, MAX_BATCH * DRAFT_TOKENS)
    batch, x = graph_batch(ForwardMode.TARGET_VERIFY, requests, padding=2), inputs(2 * DRAFT_TOKENS, seed=16)
    replayed.init_forward_metadata_out_graph(batch)
    forward(replayed, batch, x)
    run(eager, verify_batch(requests), x)
    commit(replayed, [2, 3, 1, 1])
    commit(eager, [2, 3])
    assert equal(states(replayed), states(eager))


def test_graph_tracks_decoded_states_from_its_static_buffer() -> None:
    one, requests, mask = backend(), [3, 1, 4], torch.tensor([True, False, True, False])
    one.init_cuda_graph_state(MAX_BATCH, MAX_BATCH)
    batch = graph_batch(ForwardMode.DECODE, requests, padding=1)
    batch.mamba_track_mask, batch.mamba_track_indices = mask, torch.tensor([15, 16, 17, 0])
    before = states(one)
    one.init_forward_metadata_out_graph(batch)
    assert one.forward_metadata.mamba_track_indices.data_ptr() == one.mamba_track_indices_buf.data_ptr()
    forward(one, batch, inputs(MAX_BATCH, seed=15))
    assert equal(at(states(one), [15, 17]), at(states(one), SLOTS[[3, 4]]))
    assert untouched(before, states(one), [*slots_of(requests).tolist(), 15, 17])


def test_chunks_of_sglang_are_chunks_of_the_kernel() -> None:
    assert SGLANG_CHUNK_SIZE % CHUNK_SIZE == 0


class TestWrapper:
    @staticmethod
    def runner_of(model: Any, *, draft: bool = False) -> SimpleNamespace:
        of = runner()
        config = Qwen3NextConfig(num_hidden_layers=4, full_attention_interval=2)
        of.model, of.is_draft_worker = model, draft
        of.model_config = SimpleNamespace(hf_config=config, hf_text_config=config)
        return of

    def test_other_models_get_the_original(self) -> None:
        of, full, theirs = self.runner_of(torch.nn.Identity()), object(), object()
        seen: list[Any] = []

        def original(*arguments: Any) -> Any:
            seen.extend(arguments)
            return theirs

        assert _attention(original, of, full) is theirs
        assert seen == [of, full]

    @pytest.mark.parametrize(("draft", "full_layers"), [(False, FULL_LAYERS), (True, [0])])
    def test_our_model_gets_our_backend(self, draft: bool, full_layers: list[int]) -> None:
        of = self.runner_of(SimpleNamespace(is_qnext=True), draft=draft)
        full = CpuAttentionBackend(of)
        wrapped = _attention(pytest.fail, of, full)
        assert type(wrapped) is CpuHybridBackend
        assert wrapped.full_attn_backend is full
        assert type(wrapped.linear_attn_backend) is CpuGatedDeltaNetBackend
        assert wrapped.full_attn_layers == full_layers
