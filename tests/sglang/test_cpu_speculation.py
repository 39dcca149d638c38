"""The functions that stand in for SGLang's kernels, against loops straight from their definitions."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.sampler import top_p_normalize_probs_torch
from torch import Tensor

from qnext_sglang.cpu import speculation

BATCHES = (0, 1, 2, 5)
WIDTHS = (2, 3, 4, 5)
LARGEST_COIN = 1.0 - 2.0**-24


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def integers(high: int, shape: tuple[int, ...], random: torch.Generator, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(high, shape, generator=random, dtype=dtype)


def ragged(batch: int, random: torch.Generator, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Different requests and their ranges, some of them empty."""
    requests = torch.randperm(batch + 3, generator=random)[:batch]
    starts = integers(20, (batch,), random)
    lengths = integers(longest + 1, (batch,), random)
    lengths[::3] = 0
    return requests, starts, starts + lengths


@pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("batch", BATCHES)
def test_assigned_locations_stand_in_each_requests_range(
    batch: int, table_dtype: torch.dtype, random: torch.Generator
) -> None:
    requests, starts, ends = ragged(batch, random, longest=9)
    table = integers(1000, (batch + 3, 40), random, table_dtype)
    locations = 1000 + torch.randperm(100, generator=random)
    expected, taken = table.clone(), 0
    for request, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
        for column in range(start, end):
            expected[request, column] = locations[taken]
            taken += 1
    speculation.assign_req_to_token_pool_func(requests, table, starts, ends, locations, batch)
    assert torch.equal(table, expected)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("batch", BATCHES)
def test_locations_are_read_request_by_request(batch: int, width: int, random: torch.Generator) -> None:
    requests, starts, ends = ragged(batch, random, longest=width)
    table = integers(1000, (batch + 3, 40), random, torch.int32)
    expected = [
        int(table[request, column])
        for request, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True)
        for column in range(start, end)
    ]
    found = speculation.assign_extend_cache_locs(
        req_pool_indices=requests,
        req_to_token=table,
        start_offset=starts,
        end_offset=ends,
        batch_size=batch,
        draft_token_num=width,
        device="cpu",
    )
    assert (found.shape, found.dtype) == ((batch * width,), torch.int64)
    assert found[: len(expected)].tolist() == expected


@pytest.mark.parametrize("batch", BATCHES)
def test_locations_come_back_as_they_were_assigned(batch: int, random: torch.Generator) -> None:
    requests, starts, _ = ragged(batch, random, longest=0)
    table, locations = torch.zeros(batch + 3, 40, dtype=torch.int32), torch.randperm(4 * batch, generator=random) + 1
    speculation.assign_req_to_token_pool_func(requests, table, starts, starts + 4, locations, batch)
    found = speculation.assign_extend_cache_locs(
        req_pool_indices=requests,
        req_to_token=table,
        start_offset=starts,
        end_offset=starts + 4,
        batch_size=batch,
        draft_token_num=4,
        device="cpu",
    )
    assert torch.equal(found, locations)


@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize(("topk", "columns"), [(1, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("batch", BATCHES)
def test_draft_locations_follow_the_sequence(
    batch: int, topk: int, columns: int, with_positions: bool, random: torch.Generator
) -> None:
    requests, lengths, _ = ragged(batch, random, longest=0)
    table = integers(1000, (batch + 3, 40), random, torch.int32)
    out = torch.zeros(batch * topk * columns, dtype=torch.int64)
    positions = torch.zeros(batch * topk, dtype=torch.int64) if with_positions else None
    mrope = torch.zeros(3, batch * topk, dtype=torch.int64) if with_positions else None
    speculation.assign_draft_cache_locs_contiguous_func(
        requests, table, lengths, out, topk, columns, positions=positions, mrope=mrope
    )
    expected, first = [], []
    for request, length in zip(requests.tolist(), lengths.tolist(), strict=True):
        expected += [int(table[request, length + step]) for step in range(topk * columns)]
        first += [length] * topk
    assert out.tolist() == expected
    if positions is not None and mrope is not None:
        assert positions.tolist() == first
        assert mrope.tolist() == [first] * 3


def chain(lengths: Tensor, width: int) -> SimpleNamespace:
    """The tree of a chain of drafts, in buffers that hold something else."""
    batch = len(lengths)
    tree = SimpleNamespace(mask=torch.ones(batch * width * width, dtype=torch.bool))
    tree.positions = torch.full((batch * width,), -7)
    tree.index, tree.next_token, tree.next_sibling = torch.full((3, batch, width), -7)
    speculation.build_tree_kernel_efficient_func(
        torch.empty(batch, 0, dtype=torch.int64),
        torch.arange(width - 1).expand(batch, -1),
        lengths,
        tree.mask,
        tree.positions,
        tree.index,
        tree.next_token,
        tree.next_sibling,
        1,
        width - 1,
        width,
        0,
    )
    return tree


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("batch", BATCHES)
def test_tree_is_a_chain(batch: int, width: int, dtype: torch.dtype, random: torch.Generator) -> None:
    lengths = integers(50, (batch,), random, dtype)
    tree = chain(lengths, width)
    for row, length in enumerate(lengths.tolist()):
        for step in range(width):
            assert tree.positions[row * width + step] == length + step
            assert tree.index[row, step] == row * width + step
            assert tree.next_token[row, step] == (step + 1 if step + 1 < width else -1)
            assert tree.next_sibling[row, step] == -1


def outputs(batch: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """SGLang's predicts, accept_index and accept_token_num before a verify."""
    index = torch.full((batch, width), -1, dtype=torch.int32)
    return torch.zeros(batch * width, dtype=torch.int32), index, torch.full((batch,), 99, dtype=torch.int32)


def plain_greedy(candidates: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, width = candidates.shape
    predicts, index, count = outputs(batch, width)
    for row in range(batch):
        accepted = 0
        while accepted < width - 1 and candidates[row, accepted + 1] == target[row, accepted]:
            accepted += 1
        count[row] = accepted
        for step in range(accepted + 1):
            predicts[row * width + step] = target[row, step]
            index[row, step] = row * width + step
    return predicts, index, count


@pytest.mark.parametrize("accepted", ["none", "partly", "all"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("batch", BATCHES)
def test_greedy_verification_accepts_what_the_target_predicts(
    batch: int, width: int, accepted: str, random: torch.Generator
) -> None:
    candidates = integers(9, (batch, width), random)
    target = candidates.roll(-1, 1)
    if accepted == "none":
        target[:, 0] += 1
    elif accepted == "partly":
        for row in range(batch):
            target[row, row % width] += 1
    tree = chain(torch.zeros(batch, dtype=torch.int64), width)
    found = speculation.verify_tree_greedy_func(
        *outputs(batch, width), candidates, tree.index, tree.next_token, tree.next_sibling, target, topk=1
    )
    for ours, expected in zip(found, plain_greedy(candidates, target), strict=True):
        assert torch.equal(ours, expected)
    assert found[1].shape == (batch, width)


def test_draft_behind_a_rejected_one_is_not_accepted() -> None:
    candidates, target = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[9, 3, 4, 5]])
    tree = chain(torch.tensor([0]), 4)
    predicts, index, count = speculation.verify_tree_greedy_func(
        *outputs(1, 4), candidates, tree.index, tree.next_token, tree.next_sibling, target
    )
    assert (predicts[0], index.tolist(), count.tolist()) == (9, [[0, -1, -1, -1]], [0])


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("batch", BATCHES)
def test_bonus_token_is_the_last_accepted_one(batch: int, width: int, flat: bool, random: torch.Generator) -> None:
    tokens = integers(1000, (batch, width), random, torch.int32)
    lengths = 1 + integers(width, (batch,), random, torch.int32)
    bonus = torch.zeros(batch, dtype=torch.int32)
    speculation.fill_bonus_tokens_func(tokens.flatten() if flat else tokens, lengths, bonus, width, batch)
    assert bonus.tolist() == [int(tokens[row, length - 1]) for row, length in enumerate(lengths.tolist())]


def distributions(rows: int, vocabulary: int, random: torch.Generator) -> Tensor:
    return torch.softmax(3 * torch.randn(rows, vocabulary, generator=random), dim=1)


def test_top_k_keeps_the_k_largest(random: torch.Generator) -> None:
    probs, top_ks = distributions(5, 40, random), torch.tensor([1, 2, 7, 39, 40], dtype=torch.int32)
    found = speculation.top_k_renorm_prob(probs, top_ks)
    for row, k in enumerate(top_ks.tolist()):
        expected = torch.zeros(40)
        for token in sorted(range(40), key=lambda token: -float(probs[row, token]))[:k]:
            expected[token] = probs[row, token]
        torch.testing.assert_close(found[row], expected / expected.sum())


def test_top_k_keeps_ties_at_the_last() -> None:
    probs = torch.tensor([[2, 4, 2, 2, 1, 5]]) / 16
    found = speculation.top_k_renorm_prob(probs, torch.tensor([3]))
    torch.testing.assert_close(found, torch.tensor([[2, 4, 2, 2, 0, 5]]) / 15)


def test_top_k_of_one_keeps_what_argmax_takes_of_equals() -> None:
    probs = torch.tensor([[2, 5, 4, 5]]) / 16
    found = speculation.top_k_renorm_prob(probs, torch.tensor([1], dtype=torch.int32))
    assert found.tolist() == [[0.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("k", [40, 41, 1 << 30])
def test_top_k_of_the_vocabulary_or_more_keeps_everything(k: int, random: torch.Generator) -> None:
    probs = distributions(3, 40, random)
    torch.testing.assert_close(speculation.top_k_renorm_prob(probs, torch.full((3,), k, dtype=torch.int32)), probs)


def test_top_p_keeps_the_fewest_that_reach_p(random: torch.Generator) -> None:
    top_ps = torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.999])
    probs = distributions(5, 40, random)
    found = speculation.top_p_renorm_prob(probs, top_ps)
    for row, p in enumerate(top_ps.tolist()):
        expected = torch.zeros(40)
        for token in sorted(range(40), key=lambda token: -float(probs[row, token])):
            if expected.sum() >= p:
                break
            expected[token] = probs[row, token]
        torch.testing.assert_close(found[row], expected / expected.sum())
    torch.testing.assert_close(found, top_p_normalize_probs_torch(probs, top_ps))


def test_top_p_stops_where_p_is_reached_exactly() -> None:
    probs = torch.tensor([[1, 8, 4, 3]]) / 16
    found = speculation.top_p_renorm_prob(probs, torch.tensor([0.75]))
    torch.testing.assert_close(found, torch.tensor([[0, 8, 4, 0]]) / 12)


@pytest.mark.parametrize("vocabulary", [40, 4096, 151_936])
def test_top_p_of_one_keeps_everything(vocabulary: int, random: torch.Generator) -> None:
    probs = distributions(8, vocabulary, random)
    found = speculation.top_p_renorm_prob(probs, torch.ones(8))
    assert bool((found > 0).all()), f"{int((found == 0).sum())} tokens lost"
    torch.testing.assert_close(found, probs)


@pytest.mark.parametrize("renormalise", [speculation.top_k_renorm_prob, speculation.top_p_renorm_prob])
def test_one_token_is_left_certain(renormalise: object, random: torch.Generator) -> None:
    probs = distributions(6, 40, random)
    limits = (
        torch.ones(6, dtype=torch.int32) if renormalise is speculation.top_k_renorm_prob else torch.full((6,), 1e-9)
    )
    found = renormalise(probs, limits)  # type: ignore[operator]
    assert torch.equal(found, torch.nn.functional.one_hot(probs.argmax(1), 40).float())


def sample(
    candidates: Tensor, target_probs: Tensor, coins: Tensor, last_coins: Tensor, **thresholds: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, width = candidates.shape
    tree = chain(torch.zeros(batch, dtype=torch.int64), width)
    predicts, index, count = outputs(batch, width)
    speculation.tree_speculative_sampling_target_only(
        predicts=predicts,
        accept_index=index,
        accept_token_num=count,
        candidates=candidates,
        retrive_index=tree.index,
        retrive_next_token=tree.next_token,
        retrive_next_sibling=tree.next_sibling,
        uniform_samples=coins,
        uniform_samples_for_final_sampling=last_coins,
        target_probs=target_probs,
        draft_probs=torch.zeros_like(target_probs),
        **thresholds,
    )
    return predicts, index, count


def plain_sampling(
    candidates: Tensor, target_probs: Tensor, coins: Tensor, last_coins: Tensor, single: float, acc: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, width = candidates.shape
    predicts, index, count = outputs(batch, width)
    for row in range(batch):
        probs, accepted = target_probs[row].double().clone(), 0
        index[row, 0] = row * width
        while accepted < width - 1:
            draft = int(candidates[row, accepted + 1])
            p = float(probs[accepted, draft])
            if p > 0 and (coins[row, accepted] < min(1.0, p / acc) or p >= single):
                predicts[row * width + accepted] = draft
                accepted += 1
                index[row, accepted] = row * width + accepted
            else:
                probs[accepted, draft] = 0
                break
        count[row] = accepted
        point, total = float(last_coins[row]) * float(probs[accepted].sum()), 0.0
        for token in range(probs.shape[1]):
            total += float(probs[accepted, token])
            if total > point:
                predicts[row * width + accepted] = token
                break
    return predicts, index, count


@pytest.mark.parametrize(("single", "acc"), [(1.0, 1.0), (0.2, 1.0), (1.0, 0.3), (0.3, 0.6)])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("batch", [0, 1, 50])
def test_sampling_does_what_its_definition_says(
    batch: int, width: int, single: float, acc: float, random: torch.Generator
) -> None:
    target_probs = distributions(batch * width, 8, random).view(batch, width, 8)
    candidates = integers(8, (batch, width), random)
    likely = target_probs.argmax(2).roll(1, 1)
    candidates = torch.where(torch.rand(batch, width, generator=random) < 0.6, likely, candidates)
    coins, last_coins = torch.rand(batch, width, generator=random), torch.rand(batch, generator=random)
    found = sample(candidates, target_probs, coins, last_coins, threshold_single=single, threshold_acc=acc)
    expected = plain_sampling(candidates, target_probs, coins, last_coins, single, acc)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


# Of the target at the first, second and third token; tokens 0, 4 and 7 are impossible somewhere.
TARGET = torch.tensor(
    [
        [0.00, 0.30, 0.05, 0.25, 0.00, 0.15, 0.25, 0.00],
        [0.10, 0.02, 0.40, 0.00, 0.08, 0.30, 0.10, 0.00],
        [0.00, 0.20, 0.20, 0.20, 0.00, 0.25, 0.15, 0.00],
    ]
)


@pytest.mark.parametrize("drafts", [(1, 2), (2, 5), (5, 1), (0, 2), (1, 7)])
def test_sampled_tokens_follow_the_target(drafts: tuple[int, int], random: torch.Generator) -> None:
    draws, (first, second) = 200_000, drafts
    candidates = torch.tensor([[3, first, second]]).expand(draws, -1)
    coins, last_coins = torch.rand(draws, 3, generator=random), torch.rand(draws, generator=random)
    predicts, _, count = sample(candidates, TARGET.expand(draws, -1, -1), coins, last_coins)
    tokens = predicts.view(draws, 3).masked_fill(torch.arange(3) > count[:, None], -1)
    outcomes = Counter(map(tuple, tokens.tolist()))

    expected = {}
    for token in range(8):
        if token != first:
            expected[token, -1, -1] = TARGET[0, token]
        if token != second:
            expected[first, token, -1] = TARGET[0, first] * TARGET[1, token]
        expected[first, second, token] = TARGET[0, first] * TARGET[1, second] * TARGET[2, token]
    expected = {outcome: float(p) for outcome, p in expected.items() if p > 0}
    assert set(outcomes) <= set(expected)
    chi_square = sum((outcomes[outcome] - draws * p) ** 2 / (draws * p) for outcome, p in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("single", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("acc", [1.0, 0.3, 0.0])
def test_impossible_token_is_never_produced(single: float, acc: float) -> None:
    extremes = torch.tensor([0.0, 0.5, LARGEST_COIN])
    cases = torch.cartesian_prod(torch.arange(8), torch.arange(8), torch.arange(3), torch.arange(3))
    candidates = torch.nn.functional.pad(cases[:, :2], (1, 0))
    coins, last_coins = extremes[cases[:, 2]][:, None].expand(-1, 3), extremes[cases[:, 3]]
    target_probs = TARGET.expand(len(cases), -1, -1)
    predicts, _, count = sample(candidates, target_probs, coins, last_coins, threshold_single=single, threshold_acc=acc)
    given = target_probs.gather(2, predicts.view(-1, 3, 1).long()).squeeze(2)
    impossible = (given == 0) & (torch.arange(3) <= count[:, None])
    assert not impossible.any(), f"{int(impossible.sum())} tokens of probability zero"


def accepted_share(**thresholds: float) -> Tensor:
    """How often each token is accepted as the first draft, over coins spread evenly."""
    even = (torch.arange(1000) + 0.5) / 1000
    drafts = torch.cartesian_prod(torch.tensor([3]), torch.arange(8)).repeat_interleave(1000, 0)
    coins = even.repeat(8)
    _, _, count = sample(drafts, TARGET[:2].expand(8000, -1, -1), coins[:, None].expand(-1, 2), coins, **thresholds)
    return count.view(8, 1000).double().mean(1)


def test_draft_is_accepted_with_the_targets_probability() -> None:
    torch.testing.assert_close(accepted_share(), TARGET[0].double(), rtol=0, atol=1e-3)


def test_threshold_single_accepts_every_draft_that_is_likely_enough() -> None:
    likely = torch.where(TARGET[0] >= 0.2, 1.0, TARGET[0]).double()
    torch.testing.assert_close(accepted_share(threshold_single=0.2), likely, rtol=0, atol=1e-3)


def test_threshold_acc_raises_every_drafts_chance() -> None:
    raised = (TARGET[0] / 0.2).clamp(max=1).double()
    torch.testing.assert_close(accepted_share(threshold_acc=0.2), raised, rtol=0, atol=1e-3)


def test_sample_of_a_sequence_does_not_depend_on_the_batch(random: torch.Generator) -> None:
    target_probs = distributions(60, 8, random).view(20, 3, 8)
    candidates, coins = integers(8, (20, 3), random), torch.rand(20, 3, generator=random)
    last_coins = torch.rand(20, generator=random)
    predicts, _, count = sample(candidates, target_probs, coins, last_coins)
    for row in range(20):
        one = slice(row, row + 1)
        alone, _, count_alone = sample(candidates[one], target_probs[one], coins[one], last_coins[one])
        assert torch.equal(alone, predicts.view(20, 3)[row])
        assert torch.equal(count_alone, count[one])
