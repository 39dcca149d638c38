"""How a model without training comes to have a known greedy continuation, and a draft of a chosen acceptance.

Every token has a code, a vector of ±1, and random codes of some width are nearly orthogonal. The embedding is the code;
the head's row of a token is the code of the token before it in a random cycle. A layer adds little to the residual
stream, so that the token after t is its successor π(t) by a wide margin.

One dimension of the embedding is no code but a flag. The draft's ``mtp.fc`` passes the next token's code on, and the
head, which it shares, makes its successor of it: the draft is right. Where the flag is set, ``mtp.fc`` adds three times
the code of one fixed token, and the head says that token's successor: the draft is wrong. The flag is set for a chosen
share of the tokens, in no order, so that drafts are right independently of each other along the cycle.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from qnext_plugins.cli.checkpoint.streams import generator

LOUDNESS = 3.0
"""What a flag adds, in codes: more than the right answer's one."""
ROWS = 16384
"""How many rows of a large matrix are made at a time."""


class Structure:
    """The cycle, the codes and the flags of a checkpoint; a function of its seed and sizes alone.

    Args:
        vocabulary: number of tokens V.
        hidden: width H of the embedding.
        outside: tokens that are never said, such as the end of the text. As a context each counts as the cycle's first.
        acceptance: share of the cycle's tokens after which the draft is right, at least one of them.
        seed: of the checkpoint.
    """

    def __init__(self, vocabulary: int, hidden: int, outside: Sequence[int], acceptance: float, seed: int) -> None:
        self.vocabulary, self.hidden, self.seed = vocabulary, hidden, seed
        inside = torch.ones(vocabulary, dtype=torch.bool)
        inside[list(outside)] = False
        tokens = inside.nonzero().squeeze(1)
        self.cycle = tokens[torch.randperm(len(tokens), generator=generator(seed, "cycle"))]
        """[N]: each token's successor is the next one."""
        right = max(1, round(acceptance * len(tokens)))
        self.right = torch.zeros(vocabulary, dtype=torch.bool)
        """[V]: after which tokens of the cycle the draft is right."""
        self.right[self.cycle[torch.randperm(len(tokens), generator=generator(seed, "draft"))[:right]]] = True

    @cached_property
    def successor(self) -> Tensor:
        """[V]: π, the token that the model says after each token."""
        following = torch.full((self.vocabulary,), int(self.cycle[1 % len(self.cycle)]))
        following[self.cycle] = self.cycle.roll(-1)
        return following

    @cached_property
    def codes(self) -> Tensor:
        """[V, H] int8 of ±1; the last column, which is the flag's, is 0."""
        shape, stream = (self.vocabulary, self.hidden), generator(self.seed, "codes")
        bits = torch.randint(0, 2, shape, generator=stream, dtype=torch.int8)
        codes = bits.mul_(2).sub_(1)
        codes[:, -1] = 0
        outside = torch.ones(self.vocabulary, dtype=torch.bool)
        outside[self.cycle] = False
        codes[outside] = codes[self.cycle[0]].clone()
        return codes

    def embedding(self, dtype: torch.dtype) -> Tensor:
        """[V, H]: the codes, and the flag where the draft is to be wrong."""
        embedding = self.codes.to(dtype)
        flagged = ~self.right
        flagged[self.successor == self.successor[self.cycle[0]]] = not bool(self.right[self.cycle[0]])
        embedding[flagged, -1] = 1
        return embedding

    def head(self, dtype: torch.dtype) -> Tensor:
        """[V, H]: row π(t) is the code of t, scaled so that a stray token's logit has a deviation of 1; others 0."""
        head = torch.zeros(self.vocabulary, self.hidden, dtype=dtype)
        for tokens in self.cycle.split(ROWS):
            head[self.successor[tokens]] = self.codes[tokens].to(dtype) * self.hidden**-0.5
        return head

    def fc(self) -> Tensor:
        """[H, H] float32: the half of ``mtp.fc`` that reads the next token's embedding."""
        fc = torch.eye(self.hidden)
        fc[:, -1] = LOUDNESS * self.codes[self.right.nonzero()[0, 0]].float()
        return fc
