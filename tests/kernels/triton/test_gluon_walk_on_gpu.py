"""On Hopper: the walk in Gluon has the bits of the walk in Triton, which the other tests compare with the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qnext_kernels import force_backend, gated_delta_rule_prefill
from qnext_kernels.gated_delta_rule import triton_state
from tests.kernels.delta_rule_runs import Shape, join, place, random_gates, random_runs
from tests.kernels.kernel_inputs import memory, start_offsets
from tests.kernels.triton.interpreter import kernels_run

SHAPE = Shape(2, 2, 128, 128)
BATCHES: dict[str, tuple[list[int], list[int] | None]] = {
    "a chunk": ([64], None),
    "a chunk and one": ([65], None),
    "short of a chunk": ([127], None),
    "one": ([2048], None),
    "ragged": ([70, 1, 513, 64, 4, 0, 200], None),
    "snapshots": ([320, 64, 90, 130, 700], [192, 64, 64, -1, 640]),
}
"""Lengths, and where a snapshot is taken, -1 for none."""

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper() -> Iterator[None]:
    with kernels_run("gpu"):
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")
        yield


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("backend", ["triton", "triton_context_parallel"])
def test_both_walks_have_the_same_bits(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, behind = BATCHES[name]
    runs, gates = random_runs(SHAPE, lengths, torch.bfloat16, torch.float32), random_gates(SHAPE)
    runs[1:2] = [run._replace(state=None) for run in runs[1:2]]
    pool, slots = place(runs, torch.float32, columns=2)
    slots[2:3] = -1
    known = torch.tensor([run.state is not None for run in runs])
    snapshots: tuple[torch.Tensor, ...] = ()
    if behind is not None:
        lengths_kept = torch.tensor(behind, dtype=torch.int32)
        snapshots = torch.where(lengths_kept < 0, -1, slots[:, 1]).int(), lengths_kept.clamp(min=0)

    def run(*, in_gluon: bool) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(triton_state, "_gluon_allowed", in_gluon)
        states = pool.clone()
        with force_backend(backend):
            out = gated_delta_rule_prefill(
                *join(runs), *gates, states, slots[:, 0].contiguous(), start_offsets(lengths), known, *snapshots
            )
        return out, memory(states)

    (out, states), (expected, left) = run(in_gluon=True), run(in_gluon=False)
    assert torch.equal(out, expected)
    assert torch.equal(states, left)


def test_its_kernel_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from qnext_kernels.gated_delta_rule import gluon_walk

    calls = []
    monkeypatch.setattr(gluon_walk, "run_gluon_walk", lambda *given: calls.append(given))
    runs, gates = random_runs(SHAPE, [64], torch.bfloat16, torch.float32), random_gates(SHAPE)
    pool, slots = place(runs, torch.float32)
    with force_backend("triton"):
        gated_delta_rule_prefill(*join(runs), *gates, pool, slots[:, 0], start_offsets([64]), torch.tensor([True]))
    assert len(calls) == 1
