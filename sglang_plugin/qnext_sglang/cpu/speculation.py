"""SGLang's speculative decoding of a chain of drafts, where its Triton and CUDA kernels do not run.

Each function has the name and the arguments of the one it replaces (``hooks`` has the table), and writes the same.
B is the batch, N the tokens that a sequence verifies (its last accepted one and N − 1 drafts).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _ranges(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of all elements of the ragged ranges ``starts[b]:ends[b]``, row by row."""
    starts, lengths = starts.long(), (ends - starts).long()
    rows = torch.arange(len(starts)).repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    return rows, torch.arange(len(rows)) - first[rows] + starts[rows]


def assign_req_to_token_pool_func(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    """Write cache locations to ``req_to_token[request, start:end]``, request by request."""
    rows, columns = _ranges(start_offset, end_offset)
    req_to_token[req_pool_indices.long()[rows], columns] = out_cache_loc[: len(rows)].to(req_to_token.dtype)


def assign_extend_cache_locs(
    *,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    batch_size: int,
    draft_token_num: int,
    device: Any,
) -> Tensor:
    """Read the cache locations ``req_to_token[request, start:end]``: [B · N] int64."""
    rows, columns = _ranges(start_offset, end_offset)
    locations = torch.zeros(batch_size * draft_token_num, dtype=torch.int64)
    locations[: len(rows)] = req_to_token[req_pool_indices.long()[rows], columns].long()
    return locations


def assign_draft_cache_locs_contiguous_func(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    topk: int,
    num_cols: int,
    positions: Tensor | None = None,
    mrope: Tensor | None = None,
) -> None:
    """Write each request's ``topk · num_cols`` locations from ``seq_lens`` on, and the drafts' first positions."""
    columns = seq_lens.long()[:, None] + torch.arange(topk * num_cols)
    out_cache_loc.copy_(req_to_token[req_pool_indices.long()[:, None], columns].flatten())
    for target in (positions, mrope):
        if target is not None:
            target.copy_(seq_lens.repeat_interleave(topk))


def build_tree_kernel_efficient_func(
    parent_list: Tensor,
    top_scores_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: Any,
) -> None:
    """Lay the tokens out as a chain; our attention masks by position, so ``tree_mask`` stays as it is."""
    batch, order = len(seq_lens), torch.arange(num_verify_tokens)
    retrieve_index.copy_(torch.arange(batch * num_verify_tokens).view(batch, num_verify_tokens))
    retrieve_next_token.copy_(torch.where(order + 1 < num_verify_tokens, order + 1, -1).expand_as(retrieve_next_token))
    retrieve_next_sibling.fill_(-1)
    positions.copy_((seq_lens.long()[:, None] + order).flatten())


def verify_tree_greedy_func(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    target_predict: Tensor,
    topk: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept drafts [B, 1:N] of ``candidates`` as long as they are what the target predicts [B, N]."""
    accepted = _leading(candidates[:, 1:] == target_predict[:, :-1])
    _write(predicts, accept_index, accept_token_num, accepted, target_predict)
    return predicts, accept_index, accept_token_num


def tree_speculative_sampling_target_only(
    *,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Accept a draft with the target's probability of it; at the first rejection, draw from what is left.

    Speculative sampling (arXiv 2211.17192) with a draft that proposes one token: with both thresholds at 1 the tokens
    have the target's distribution [B, N, vocabulary].
    """
    drafts = candidates[:, 1:].long()
    probability = target_probs[:, :-1].gather(2, drafts[:, :, None]).squeeze(2)
    coins = uniform_samples[:, : drafts.shape[1]]
    likely = (coins < probability / threshold_acc) | (probability >= threshold_single)
    accepted = _leading(likely & (probability > 0))
    batch = torch.arange(len(candidates))
    rest = target_probs[batch, accepted].double()
    rejecting = accepted < drafts.shape[1]
    rest[batch[rejecting], drafts[batch[rejecting], accepted[rejecting]]] = 0.0
    cumulative = rest.cumsum(1)
    point = uniform_samples_for_final_sampling.view(-1, 1).double() * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, point, right=True).clamp(max=rest.shape[1] - 1)
    tokens = torch.cat([drafts, drawn], dim=1).scatter(1, accepted[:, None], drawn)
    _write(predicts, accept_index, accept_token_num, accepted, tokens)


def _leading(hits: Tensor) -> Tensor:
    """How many of each row [B, N − 1] are true before the first that is not: [B] int64."""
    return hits.long().cumprod(1).sum(1)


def _write(predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor, accepted: Tensor, tokens: Tensor) -> None:
    """Store the first ``accepted + 1`` of each row of tokens [B, N], their indices, and how many drafts they hold."""
    batch, width = tokens.shape
    valid = torch.arange(width) <= accepted[:, None]
    flat = torch.arange(batch * width).view(batch, width)
    predicts[flat[valid]] = tokens[valid].to(predicts.dtype)
    accept_index[:, :width] = torch.where(valid, flat, -1).to(accept_index.dtype)
    accept_token_num.copy_(accepted)


def fill_bonus_tokens_func(
    accept_tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, accept_stride: int, batch_size: int
) -> None:
    """Write each sequence's last accepted token."""
    last = torch.arange(batch_size) * accept_stride + accept_lens[:batch_size].long() - 1
    bonus_tokens[:batch_size] = accept_tokens.flatten()[last].to(bonus_tokens.dtype)


def top_k_renorm_prob(probs: Tensor, top_ks: Tensor) -> Tensor:
    """Keep the ``top_ks[b]`` largest of probs [B, vocabulary] (ties at the last included), renormalised.

    Of one, which is how SGLang says greedy, that of the lowest index is kept alone, as argmax has it.
    """
    last = probs.sort(dim=1, descending=True).values.gather(1, (top_ks.long().clamp(1, probs.shape[1]) - 1).view(-1, 1))
    best = torch.arange(probs.shape[1]) == probs.argmax(dim=1, keepdim=True)
    return _renormalise(torch.where((probs >= last) & (best | (top_ks.view(-1, 1) > 1)), probs, 0.0))


def top_p_renorm_prob(probs: Tensor, top_ps: Tensor) -> Tensor:
    """Keep the fewest most likely of probs [B, vocabulary] whose sum reaches ``top_ps[b]``, renormalised."""
    # Summed from the least likely up, in float64: from the other end the sum is 1 before the tail is reached.
    ordered, order = probs.sort(dim=1)
    cumulative = ordered.double().cumsum(1)
    ordered = torch.where(cumulative > (1 - top_ps.double().view(-1, 1)) * cumulative[:, -1:], ordered, 0.0)
    return _renormalise(torch.zeros_like(probs).scatter(1, order, ordered))


def _renormalise(probs: Tensor) -> Tensor:
    return probs / probs.sum(dim=1, keepdim=True)
