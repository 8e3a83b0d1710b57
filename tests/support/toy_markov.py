"""A toy world for losslessness tests: Markov target and draft through the real sampler.

Rows run ragged multi-round speculation: each accepts a different number of drafts each round, the
draft length changes from round to round and from row to row (by context only). The target's law is
known exactly, so the emitted tokens can be tested against it with exact p-values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import chi2
from torch import Tensor

from decoder.requests.params import SamplingParams
from decoder.round import Draft, Verdict
from decoder.sampling import Probs, Sampler

VOCAB = 6


def random_chain(seed: int, vocab: int = VOCAB, spread: float = 1.2) -> Tensor:
    """Log-probabilities ``[V, V]`` of a random Markov chain, fp64."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(vocab, vocab, generator=generator, dtype=torch.float64)
    return logits.log_softmax(dim=-1)


def half_mixed_draft(target: Tensor, seed: int) -> Tensor:
    """A draft that is half the target and half another chain: some accepted, some not."""
    other = random_chain(seed, target.shape[0])
    return (0.5 * target.exp() + 0.5 * other.exp()).log()


def sampler_of(
    rows: int,
    verifier: str = "standard",
    params: SamplingParams | None = None,
    first_seed: int = 0,
    vocab: int = VOCAB,
    kind: type[Sampler] = Sampler,
) -> Sampler:
    """A sampler of ``rows`` rows that differ in their seed only.

    One row is admitted and its parameters copied: admitting each of 100 000 rows takes seconds.
    """
    sampler = kind(rows, vocab, "cpu", verifier)
    sampler.admit(0, params or SamplingParams(temperature=1.0), [0], set())
    table = sampler._table
    for name in ("greedy", "temperature", "top_k", "top_p", "min_p"):
        values = getattr(table, name)
        values[:] = values[0].clone()
    table.seeds[:rows] = torch.arange(first_seed, first_seed + rows)
    return sampler


@dataclass
class World:
    """Speculative decoding of a Markov chain; the hooks are where mutants go wrong.

    Attributes:
        target, draft: ``[V, V]`` log-probabilities given the last token.
        one_hot: draft deterministically (the draft chain's argmax), without distributions.
        gammas: draft length of each round, repeated.
        ragged: half of the rows draft one token less, decided by their context.
    """

    sampler: Sampler
    target: Tensor
    draft: Tensor
    one_hot: bool = False
    gammas: tuple[int, ...] = (3, 1, 2, 0, 3)
    ragged: bool = True
    check_draft: Callable[[Draft, Tensor, Tensor], None] | None = None
    rounds: int = field(default=0, init=False)

    def generate(self, length: int) -> Tensor:
        """``[N, length]`` tokens emitted after token 0 at position 0."""
        N = self.sampler._table.seeds.shape[0] - 1  # the last row is for padding
        tokens = torch.zeros(N, 1 + length + max(self.gammas) + 1, dtype=torch.int64)
        lengths = torch.zeros(N, dtype=torch.int64)  # position of the last emitted token
        while int(lengths.min()) < length:
            live = (lengths < length).nonzero()[:, 0]
            gamma = self.gammas[self.rounds % len(self.gammas)]
            emitted = self.step(live, tokens[live, lengths[live]], lengths[live], gamma)
            at = lengths[live, None] + 1 + torch.arange(gamma + 1)
            valid = emitted.tokens >= 0
            tokens[live[:, None].expand_as(at)[valid], at[valid]] = emitted.tokens[valid]
            lengths[live] += emitted.accepted + 1
            self.rounds += 1
        return tokens[:, 1 : length + 1]

    def step(self, rows: Tensor, current: Tensor, lengths: Tensor, gamma: int) -> Verdict:
        positions = lengths[:, None] + 1 + torch.arange(gamma + 1)
        draft = self.cut(self.propose(rows, current, positions, gamma))
        if self.check_draft is not None and gamma:
            self.check_draft(draft, rows, positions)
        context = torch.cat([current[:, None], draft.tokens], dim=1)
        logits = self.target_logits(context)
        target = self.sampler.distribution(logits, rows, positions, draft.tokens)
        verdict = self.sampler.verify(target, draft, rows, positions)
        self.sampler.commit(rows, verdict.tokens, verdict.accepted + 1, draft.lengths)
        return verdict

    def target_logits(self, context: Tensor) -> Tensor:
        return self.target.float()[context]

    def propose(self, rows: Tensor, current: Tensor, positions: Tensor, gamma: int) -> Draft:
        tokens, probs = [], []
        last = current
        for j in range(gamma):
            drawn, dist = self.draw(rows, last, positions[:, j : j + 1], tokens)
            tokens.append(drawn)
            probs.append(dist)
            last = drawn
        if gamma == 0:
            return Draft(current.new_empty(len(current), 0), None, torch.zeros_like(current))
        shorter = (current + positions[:, 0]).remainder(2) if self.ragged else 0
        lengths = torch.full_like(current, gamma) - shorter
        dense = None if probs[0] is None else torch.stack(probs, dim=1)
        return Draft(torch.stack(tokens, dim=1), dense, lengths)

    def draw(
        self, rows: Tensor, last: Tensor, position: Tensor, earlier: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        logits = self.draft.float()[last][:, None]
        if self.one_hot:
            return logits[:, 0].argmax(dim=-1), None
        prefix = torch.stack(earlier, dim=1) if earlier else None
        dist = self.sampler.distribution(logits, rows, position, prefix)
        drawn = self.sampler.draw_draft(dist, rows, position[:, 0])
        return drawn, self.declare(dist)

    def declare(self, dist: Probs) -> Tensor:
        """The distribution that travels with the drawn token."""
        assert dist.probs is not None
        return dist.probs[:, 0]

    def cut(self, draft: Draft) -> Draft:
        return draft


def transition_log_p(tokens: Tensor, chain: Tensor, start: int = 0) -> float:
    """log p-value of the χ² test of every transition in ``tokens`` ``[N, T]`` against ``chain``."""
    V = chain.shape[0]
    before = torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, :-1]], dim=1)
    counts = torch.bincount((before * V + tokens).flatten(), minlength=V * V).view(V, V).double()
    expected = counts.sum(dim=1, keepdim=True) * chain.exp()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(chi2.logsf(float(statistic), V * (V - 1)))


def joint_log_p(tokens: Tensor, chain: Tensor, start: int = 0) -> float:
    """log p-value of the χ² test of the joint law of ``tokens`` ``[N, T]``, all V**T sequences.

    Cells with fewer than 10 expected counts are pooled.
    """
    N, T = tokens.shape
    V = chain.shape[0]
    law, index = chain[start].exp(), tokens[:, 0]
    for t in range(1, T):
        law = (law.view(-1, V)[:, :, None] * chain.exp()).flatten()
        index = index * V + tokens[:, t]
    counts = torch.bincount(index, minlength=V**T).double().numpy()
    return pooled_log_p(counts, N * law.numpy())


def pooled_log_p(counts: np.ndarray, expected: np.ndarray) -> float:
    small = expected < 10
    observed, wanted = counts[~small], expected[~small]
    if small.any():
        observed = np.append(observed, counts[small].sum())
        wanted = np.append(wanted, expected[small].sum())
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    return float(chi2.logsf(statistic, len(wanted) - 1))
