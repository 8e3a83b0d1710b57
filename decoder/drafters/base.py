"""The drafter contract: what the engine hands a drafter each round and what it gets back.

A drafter only ever makes proposals; whether a token is emitted is decided by the sampler from the
target's own distribution. It therefore cannot make the output wrong as long as two rules hold:
a token travels with the distribution it was drawn from (one ``Draft``), and how many tokens a row
proposes may depend on its context and on earlier drafts, never on the token at or after the cut.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from decoder.round import Draft, StepState, Verdict

if TYPE_CHECKING:
    from decoder.model.graphs import StepGraphs
    from decoder.model.runner import ModelRunner
    from decoder.sampling import Sampler

logger = logging.getLogger(__name__)


@runtime_checkable
class Drafter(Protocol):
    """Proposes up to ``gamma`` tokens per row and round.

    Attributes:
        name: short name for logs and metrics.
        hidden_layers: indices into transformers' ``hidden_states`` that it needs from the target
            (negative allowed), or ``None`` for none.
    """

    name: str

    @property
    def hidden_layers(self) -> tuple[int, ...] | None: ...

    def bind(self, runner: ModelRunner, sampler: Sampler, max_gamma: int) -> None:
        """Attach to a target once before use; raises ``ValueError`` when it cannot serve it."""

    def admit(
        self, rows: Tensor, token_ids: Tensor, lengths: Tensor, hidden: Tensor | None
    ) -> None:
        """Take in new prompts.

        Args:
            rows: ``[R]`` int64, the rows they occupy from now on.
            token_ids: ``[R, L]`` int64, right padded.
            lengths: ``[R]`` int64 prompt lengths.
            hidden: ``[R, L, n * H]`` the target's ``hidden_layers`` at the prompt tokens.
        """

    def propose(self, state: StepState, gamma: int) -> Draft:
        """Draft ``gamma >= 1`` tokens for every live row."""

    def commit(self, state_before: StepState, verdict: Verdict, hidden: Tensor | None) -> None:
        """Learn what was accepted.

        Args:
            state_before: the state that ``propose`` saw (or, at gamma 0, would have seen).
            verdict: accepted counts ``[B]`` and emitted tokens ``[B, G + 1]``, also on the host.
            hidden: ``[B, G + 1, n * H]`` of the verify forward.
        """

    def release(self, rows: Sequence[int]) -> None:
        """Forget the sequences of these rows."""


class StatelessDrafter:
    """Base of drafters that keep nothing per row: every hook but ``propose`` is a no-op."""

    name = "stateless"
    hidden_layers: tuple[int, ...] | None = None

    def bind(self, runner: ModelRunner, sampler: Sampler, max_gamma: int) -> None:
        pass

    def admit(
        self, rows: Tensor, token_ids: Tensor, lengths: Tensor, hidden: Tensor | None
    ) -> None:
        pass

    def commit(self, state_before: StepState, verdict: Verdict, hidden: Tensor | None) -> None:
        pass

    def release(self, rows: Sequence[int]) -> None:
        pass


def graphs_of(runner: ModelRunner | None) -> StepGraphs | None:
    """What a drafter's own steps run in; ``None`` where there are no graphs, or it is unbound."""
    return runner.graphs if runner is not None and runner.static else None


def empty_draft(state: StepState, gamma: int) -> Draft:
    """A draft of ``gamma`` columns in which no row proposes anything (``lengths`` all 0)."""
    tokens = state.current[:, None].expand(-1, gamma).contiguous()
    return Draft(tokens, None, torch.zeros_like(state.lengths))


def forget_finished(drafter: Drafter) -> None:
    """Let a drafter forget the sequences that have finished, if it keeps any.

    Or a measurement that repeats its requests would have them answered by heart.
    """
    forget = getattr(drafter, "forget_finished", None)
    if forget is not None:
        forget()


def usable_length(what: str, limit: int, max_length: int) -> int:
    """Tokens of a row that a drafting model can see; longer rows are decoded without drafts.

    Args:
        what: the model, for the log.
        limit: its context.
        max_length: tokens that a row may hold.
    """
    if limit < max_length:
        logger.warning(
            "the %s has %d positions and rows may hold %d: no drafts beyond",
            *(what, limit, max_length),
        )
    return min(limit, max_length)


def rooms(state: StepState, gamma: int, limit: int) -> list[int]:
    """How many tokens each row may draft with a model of ``limit`` positions, at most ``gamma``.

    The j-th draft is read off position ``lengths + j``, counted from 0.
    """
    return [min(max(limit - length, 0), gamma) for length in state.host_lengths]


def within(positions: Tensor, limit: int, largest: int) -> Tensor:
    """``positions`` with those at or past ``limit`` made padding (-1).

    A model is never shown a position that it does not have: what a row drafts there is cut.

    Args:
        positions: integers of any shape.
        limit: of the model or its cache.
        largest: at least the largest position; spares the work where all are within.
    """
    return positions if largest < limit else torch.where(positions < limit, positions, -1)
