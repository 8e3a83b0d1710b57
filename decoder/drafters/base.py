"""The drafter contract: what the engine hands a drafter each round and what it gets back.

A drafter only ever makes proposals; whether a token is emitted is decided by the sampler from the
target's own distribution. It therefore cannot make the output wrong as long as two rules hold:
a token travels with the distribution it was drawn from (one `Draft`), and how many tokens a row
proposes may depend on its context and on earlier drafts, never on the token at or after the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from decoder.model.runner import ModelRunner
    from decoder.sampling import Sampler, Verdict


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens together with the distribution each was drawn from.

    Attributes:
        tokens: ``[B, G]`` int64. Entries at or after ``lengths`` are valid vocabulary ids that
            nobody may accept (they are still fed to the verify forward to keep shapes static).
        probs: ``[B, G, V]`` fp32, the distribution that ``tokens`` were drawn from, or ``None``
            for deterministic proposals (one-hot at the token).
        lengths: ``[B]`` int64, valid drafts per row, ``0 <= lengths <= G``.
    """

    tokens: Tensor
    probs: Tensor | None
    lengths: Tensor

    @property
    def gamma(self) -> int:
        return self.tokens.shape[1]

    def limited(self, room: Sequence[int]) -> Draft | None:
        """The draft with at most ``room[b]`` tokens in row b; ``None`` when none has any.

        On the CPU, where asking costs nothing, columns that no row has drafted are cut.
        """
        lengths = self.lengths
        if min(room) < self.gamma:
            lengths = torch.minimum(lengths, torch.tensor(room, device=lengths.device))
        if lengths.device.type != "cpu":
            return Draft(self.tokens, self.probs, lengths)
        longest = int(lengths.max())
        if longest == 0:
            return None
        probs = self.probs[:, :longest] if self.probs is not None else None
        return Draft(self.tokens[:, :longest], probs, lengths)


@dataclass(slots=True)
class StepState:
    """The live rows at the start of a round. Finished rows have been removed by the engine.

    Attributes:
        slots: ``[B]`` int64, slot index of each live row (the row of every KV cache).
        lengths: ``[B]`` int64, committed tokens with KV in the target cache, which is the absolute
            position of ``current``.
        current: ``[B]`` int64, the last emitted token; its KV is not in the target cache yet.
        previous: ``[B]`` int64, the token at position ``lengths - 1``.
        tokens: ``[max_slots, S]`` int64, every token by absolute position (prompt and output);
            ``tokens[slot, lengths] == current``. Owned by the engine, read only here.
        host_lengths: ``lengths`` as Python integers, so that sizing needs no device sync.
        host_slots: ``slots`` as Python integers; read back from the device when not given.
    """

    slots: Tensor
    lengths: Tensor
    current: Tensor
    previous: Tensor
    tokens: Tensor
    host_lengths: list[int]
    host_slots: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.host_slots:
            self.host_slots = self.slots.tolist()

    def host_rows(self) -> list[tuple[int, int]]:
        """``(slot, length)`` of every live row."""
        return list(zip(self.host_slots, self.host_lengths, strict=True))


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
        self, slots: Tensor, token_ids: Tensor, lengths: Tensor, hidden: Tensor | None
    ) -> None:
        """Take in new prompts.

        Args:
            slots: ``[R]`` int64, the slots they occupy from now on.
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
            verdict: accepted counts ``[B]`` and emitted tokens ``[B, G + 1]``.
            hidden: ``[B, G + 1, n * H]`` of the verify forward.
        """

    def release(self, slots: Sequence[int]) -> None:
        """Forget slots whose sequence finished."""


class StatelessDrafter:
    """Base of drafters that keep nothing per slot: every hook but ``propose`` is a no-op."""

    name = "stateless"
    hidden_layers: tuple[int, ...] | None = None

    def bind(self, runner: ModelRunner, sampler: Sampler, max_gamma: int) -> None:
        pass

    def admit(
        self, slots: Tensor, token_ids: Tensor, lengths: Tensor, hidden: Tensor | None
    ) -> None:
        pass

    def commit(self, state_before: StepState, verdict: Verdict, hidden: Tensor | None) -> None:
        pass

    def release(self, slots: Sequence[int]) -> None:
        pass


def empty_draft(state: StepState, gamma: int) -> Draft:
    """A draft of ``gamma`` columns in which no row proposes anything (``lengths`` all 0)."""
    tokens = state.current[:, None].expand(-1, gamma).contiguous()
    return Draft(tokens, None, torch.zeros_like(state.lengths))


class DraftChain:
    """Draws one drafted token per step and keeps it with the distribution it came from.

    Args:
        sampler: the target's; it processes draft logits exactly as it does the target's.
        state: the round's rows.
        gamma: steps to come.
    """

    def __init__(self, sampler: Sampler, state: StepState, gamma: int) -> None:
        self._sampler = sampler
        self._slots = state.slots
        self._positions = state.lengths[:, None] + 1  # [B, 1], of the token to be drawn
        self._tokens = state.current.new_empty(len(state.host_lengths), gamma)
        self._probs: list[Tensor] = []
        self._step = 0

    def draw(self, logits: Tensor) -> Tensor:
        """Next drafted token ``[B, 1]`` from ``[B, 1, V]`` logits of the target's vocabulary."""
        # Penalties count the tokens drafted so far, as they will when the target verifies.
        prefix = self._tokens[:, : self._step] if self._step else None
        dist = self._sampler.distribution(logits, self._slots, self._positions, prefix)
        if dist.argmax is not None:  # all rows greedy: no noise to compute
            token = dist.argmax[:, 0]
        else:
            assert dist.probs is not None
            token = self._sampler.draw_draft(dist, self._slots, self._positions[:, 0])
            self._probs.append(dist.probs)
        self._tokens[:, self._step] = token
        self._step += 1
        self._positions = self._positions + 1
        return token[:, None]

    def take(self, tokens: Tensor, undefined: Tensor) -> Draft:
        """The draft of all ``tokens [B, G]`` that the model chose greedily by itself.

        Raises:
            FloatingPointError: where its logits had no largest value, ``undefined [B, G]``.
        """
        self._tokens = tokens
        self._sampler.record(undefined, self._slots, self._positions)
        return self.finish()

    def finish(self) -> Draft:
        lengths = torch.full_like(self._slots, self._tokens.shape[1])
        return Draft(self._tokens, torch.cat(self._probs, dim=1) if self._probs else None, lengths)
