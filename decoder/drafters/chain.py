"""The chain of steps in which a model drafts: each draws a token that the next one reads.

On a GPU a round's chain is one graph, its draws included, for any rows and lengths of a bucket; the
same steps run without one elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from decoder.round import Draft, StepState, on_host
from decoder.sampling.verdict import leading

from .base import empty_draft, rooms, within

if TYPE_CHECKING:
    from decoder.model.graphs import StepGraphs
    from decoder.model.runner import ModelRunner
    from decoder.sampling import Sampler

# The length of a padding row in a graph: past the positions of every model.
NOWHERE = 1 << 40


class Reach(NamedTuple):
    """Which positions the steps of a chain stand at.

    Attributes:
        limit: positions of the drafting model.
        longest: of the rows' lengths; ``NOWHERE`` in a graph, which is for any rows, and where
            that is the length of padding.
        view: positions that attention looks at; ``None`` is as many as a step needs.
    """

    limit: int
    longest: int
    view: int | None = None

    def place(self, positions: Tensor, step: int) -> Tensor:
        """``positions`` of a step, counted from 0, that end at ``lengths + step``."""
        return within(positions, self.limit, self.longest + step)

    def length(self, step: int) -> int:
        """Positions that the step may see."""
        return self.view or min(self.longest + step + 1, self.limit)


class Texts(NamedTuple):
    """The rows that a chain is drafted for.

    Attributes:
        reach: which positions its steps stand at.
        history: ``[rows, S]`` tokens of all rows, by position.
        rows: ``[B]``.
        lengths: ``[B]``, of the texts but for the current token.
    """

    reach: Reach
    history: Tensor
    rows: Tensor
    lengths: Tensor


class DraftChain:
    """Draws one drafted token per step and keeps it with the distribution it came from.

    A row's draft ends before the first token whose logits defined no distribution: a draft model's
    NaN costs drafts, not the request.

    Args:
        sampler: the target's; it processes draft logits exactly as it does the target's.
        rows: ``[B]`` int64.
        lengths: ``[B]`` int64, of the rows' texts but for the current token.
        gamma: steps to come.
    """

    def __init__(self, sampler: Sampler, rows: Tensor, lengths: Tensor, gamma: int) -> None:
        self._sampler = sampler
        self._rows, self._lengths = rows, lengths
        self._positions = lengths[:, None] + 1  # [B, 1], of the token to be drawn
        self._tokens = rows.new_empty(len(rows), gamma)
        self._probs: list[Tensor] = []
        self._undefined: list[Tensor] = []
        self._step = 0

    @property
    def drawn(self) -> Tensor:
        """The tokens drafted so far, ``[B, n]``: a view."""
        return self._tokens[:, : self._step]

    def draw(self, logits: Tensor) -> Tensor:
        """Next drafted token ``[B, 1]`` from ``[B, 1, V]`` logits of the target's vocabulary."""
        # Penalties count the tokens drafted so far, as they will when the target verifies.
        prefix = self.drawn if self._step else None
        dist = self._sampler.distribution(logits, self._rows, self._positions, prefix)
        assert dist.undefined is not None
        self._undefined.append(dist.undefined)
        if dist.argmax is not None:  # all rows greedy: no noise to compute
            token = dist.argmax[:, 0]
        else:
            assert dist.probs is not None
            token = self._sampler.draw_draft(dist, self._rows, self._positions[:, 0])
            self._probs.append(dist.probs)
        self._tokens[:, self._step] = token
        self._step += 1
        self._positions = self._positions + 1
        return token[:, None]

    def take(self, tokens: Tensor, undefined: Tensor) -> Draft:
        """The draft of all ``tokens [B, G]`` that the model chose greedily by itself.

        ``undefined [B, G]``: where its logits had no largest value.
        """
        self._tokens, self._undefined = tokens, [undefined]
        return self.finish()

    def finish(self, limit: int | None = None, to: Tensor | None = None) -> Draft:
        """The draft of all steps.

        Args:
            limit: positions of the model, which cut it; ``None`` leaves that to the caller.
            to: where its distributions go, ``[B, G, V]``; ``None`` is memory of its own.
        """
        gamma = self._tokens.shape[1]
        if limit is None:
            lengths = torch.full_like(self._rows, gamma)
        else:
            lengths = (limit - self._lengths).clamp(0, gamma)
        undefined = torch.cat(self._undefined, dim=1)
        if not on_host(undefined.device) or bool(undefined.any()):
            lengths = leading(~undefined, lengths)
        probs = torch.cat(self._probs, dim=1, out=to) if self._probs else None
        return Draft(self._tokens, probs, lengths)


def shared_probs(sampler: Sampler, probs: Tensor, batch: int) -> Tensor:
    """A draft's distributions ``[B, G, V]`` where graphs of ``batch`` rows look for them.

    Those of a chain in a graph are there; others are copied, also what is there in longer rows.
    """
    shared = sampler.draft_probs(batch, probs.shape[1], probs.dtype)
    if probs.data_ptr() != shared.data_ptr():
        shared[: len(probs)].copy_(probs)
    elif probs.stride() != shared.stride():
        shared[: len(probs)].copy_(probs.clone())
    return shared


# Of ``rows``, ``lengths``, ``current`` and ``previous`` ``[B]``.
Steps = Callable[[Reach, Tensor, Tensor, Tensor, Tensor], DraftChain]


class Chains:
    """Runs a drafter's chains, each in one graph where there are any.

    Args:
        runner: of the model that drafts, or that the drafter is part of.
        sampler: the target's.
        limit: positions of the drafting model.
    """

    def __init__(self, runner: ModelRunner, sampler: Sampler, limit: int) -> None:
        self._sampler, self._limit = sampler, limit
        self._dtype = torch.promote_types(runner.dtype, torch.float32)  # of distributions

    def longest(self, state: StepState, gamma: int) -> int:
        """The most of ``gamma`` tokens that some row has positions for."""
        return max(rooms(state, gamma, self._limit))

    def draft(
        self,
        graphs: StepGraphs | None,
        key: tuple[Hashable, ...],
        steps: Steps,
        state: StepState,
        gamma: int,
    ) -> Draft:
        """The draft that ``steps`` makes, as much of it as the model has positions for.

        Args:
            graphs: of the runner, where there are any now.
            key: what else than the rows, the reach and the sampler says what ``steps`` does.
            steps: ``gamma`` of them. In a graph padding has the spare row and the length
                ``NOWHERE``.
            state: its rows, of which one at least has room for a token.

        Returns:
            Of a graph, static tensors that the next draft overwrites.
        """
        longest = max(state.host_lengths)
        inputs = [state.rows, state.lengths, state.current, state.previous]
        if graphs is None:
            draft = steps(Reach(self._limit, longest), *inputs).finish()
            room = rooms(state, gamma, self._limit)
            return draft if min(room) >= gamma else draft.limited(room) or empty_draft(state, gamma)
        reach = Reach(self._limit, NOWHERE, min(graphs.view(longest + gamma), self._limit))
        probs = None
        if not self._sampler.all_greedy(state.rows):
            shape = graphs.bucket(len(state.host_rows)), gamma
            probs = self._sampler.draft_probs(*shape, self._dtype)

        def run(*inputs: Tensor) -> list[Tensor]:
            draft = steps(reach, *inputs).finish(self._limit, probs)
            return [draft.tokens, draft.lengths]

        place = None if probs is None else probs.data_ptr()
        key = *key, gamma, reach, self._sampler.plan(self._dtype), place
        padding = [graphs.spare_row, NOWHERE, 0, 0]
        tokens, lengths = graphs.call(key, run, inputs, padding)
        return Draft(tokens, None if probs is None else probs[: len(tokens)], lengths)
