"""Parts of a round that follow a script: outcomes, draft lengths, drafts right and wrong.

`Script` fixes every row's full token sequence in advance and is given acceptance counts, so a
drafter's proposals can be compared with what it should propose after that prefix, whatever happened
before.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from support.tiny import MOE_VOCAB
from torch import Tensor

from decoder.round import Draft, StepState, Verdict


class GreedySampler:
    """The smallest thing that draws draft tokens: arg-max, no probabilities."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def distribution(
        self, logits: Tensor, rows: Tensor, positions: Tensor, prefix: Tensor | None
    ) -> Any:
        assert logits.shape[1] == 1 and positions.shape == logits.shape[:2]
        undefined = torch.zeros_like(positions, dtype=torch.bool)
        return SimpleNamespace(probs=None, argmax=logits.float().argmax(-1), undefined=undefined)

    def plan(self, dtype: torch.dtype) -> str:
        return "greedy"

    def all_greedy(self, rows: Tensor) -> bool:
        return True

    def takes_argmax(self, rows: Tensor) -> bool:
        return True

    def draw_draft(self, probs: Any, rows: Tensor, positions: Tensor) -> Tensor:
        return probs.argmax[:, 0]


class Script:
    """Rows walking along fixed sequences.

    Args:
        drafter: already bound.
        sequences: per row, all of its tokens.
        rows: per sequence, its row.
        features: per row ``[len, n * H]`` target features, for drafters that want them.
        follow: accepted drafts replace the sequence's own tokens, as real acceptance would;
            otherwise what is accepted may differ from what was drafted.
    """

    def __init__(
        self,
        drafter: Any,
        sequences: list[list[int]],
        rows: list[int],
        features: list[Tensor] | None = None,
        follow: bool = False,
    ) -> None:
        self.follow = follow
        self.drafter, self.sequences, self.rows, self.features = (
            drafter, sequences, rows, features,
        )  # fmt: skip
        self.lengths = [0] * len(rows)
        self.history = torch.full((max(rows, default=0) + 1, 600), 7)

    def admit(self, prompt_lengths: list[int]) -> None:
        """Prefill every row with the start of its sequence."""
        self.lengths = list(prompt_lengths)
        width = max(prompt_lengths)
        ids = torch.zeros(len(self.rows), width, dtype=torch.long)
        hidden = None
        if self.features is not None:
            hidden = torch.zeros(len(self.rows), width, self.features[0].shape[1],
                                 dtype=self.features[0].dtype)  # fmt: skip
        for row, (sequence, length) in enumerate(zip(self.sequences, prompt_lengths, strict=True)):
            ids[row, :length] = torch.tensor(sequence[:length])
            if hidden is not None and self.features is not None:
                hidden[row, :length] = self.features[row][:length]
        self.drafter.admit(torch.tensor(self.rows), ids, torch.tensor(prompt_lengths), hidden)

    def state(self) -> StepState:
        for row, sequence, length in zip(self.rows, self.sequences, self.lengths, strict=True):
            self.history[row, : length + 1] = torch.tensor(sequence[: length + 1])
        rows, lengths = torch.tensor(self.rows), torch.tensor(self.lengths)
        return StepState(
            rows, lengths, self.history[rows, lengths], self.history[rows, lengths - 1],
            self.history, list(self.lengths),
        )  # fmt: skip

    def round(self, gamma: int, accepted: list[int]) -> Draft | None:
        """Propose (unless gamma is 0), then move each row ``accepted + 1`` tokens on."""
        before = self.state()
        draft = self.drafter.propose(before, gamma) if gamma else None
        tokens = torch.full((len(self.rows), gamma + 1), -1)
        hidden = None
        if self.features is not None:
            # Rejected positions carry features of tokens that never were: poison.
            shape = (len(self.rows), gamma + 1, self.features[0].shape[1])
            hidden = torch.full(shape, 1e4, dtype=self.features[0].dtype)
        for row, count in enumerate(accepted):
            start = self.lengths[row]
            if draft is not None and self.follow:
                drafted = draft.tokens[row, :count].tolist()
                self.sequences[row][start + 1 : start + count + 1] = drafted
            emitted = self.sequences[row][start + 1 : start + count + 2]
            tokens[row, : count + 1] = torch.tensor(emitted)
            if hidden is not None and self.features is not None:
                hidden[row, : count + 1] = self.features[row][start : start + count + 1]
            self.lengths[row] += count + 1
        verdict = Verdict(torch.tensor(accepted), tokens)
        self.drafter.commit(before, verdict, hidden)
        return draft


class GammaSchedule:
    """A controller that walks through given draft lengths, whatever it observes."""

    def __init__(self, gammas: Sequence[int]) -> None:
        self.gammas, self.max_gamma, self._round = list(gammas), 8, 0

    def choose(self, live_batch: int, context: int) -> int:
        self._round += 1
        return self.gammas[self._round % len(self.gammas)]

    def observe(self, *args: Any) -> None:
        pass

    def admitted(self, *args: Any) -> None:
        pass

    def explain(self) -> str:
        return "scheduled"


class NoisyOracle:
    """Drafts ``tiny_moe``'s own continuation, wrong at every ``period``-th position."""

    name = "oracle"
    hidden_layers = None

    def __init__(self, continuations: dict[tuple[int, ...], list[int]], period: int) -> None:
        self.continuations, self.period = continuations, period
        self._texts: dict[int, list[int]] = {}

    def bind(self, runner: Any, sampler: Any, max_gamma: int) -> None:
        pass

    def admit(self, rows: Tensor, token_ids: Tensor, lengths: Tensor, hidden: Any) -> None:
        for row, ids, n in zip(rows.tolist(), token_ids.tolist(), lengths.tolist(), strict=True):
            self._texts[row] = ids[:n] + self.continuations[tuple(ids[:n])]

    def propose(self, state: StepState, gamma: int) -> Draft:
        drafts = [self._draft(row, length, gamma) for row, length in state.rows_and_lengths()]
        return Draft(torch.tensor(drafts), None, torch.full_like(state.lengths, gamma))

    def _draft(self, row: int, length: int, gamma: int) -> list[int]:
        positions = range(length + 1, length + 1 + gamma)
        text = self._texts[row][positions.start : positions.stop]
        text += [7] * (gamma - len(text))
        wrong = [position % self.period == 0 for position in positions]
        return [(token + bad) % MOE_VOCAB for token, bad in zip(text, wrong, strict=True)]

    def commit(self, state_before: StepState, verdict: Any, hidden: Any) -> None:
        pass

    def release(self, rows: Any) -> None:
        pass
