"""What a request gets back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .reader import Request


class TokenLogprob(NamedTuple):
    """Log-probability of one emitted token.

    Attributes:
        token_id: the token.
        raw: under the model's unprocessed logits.
        processed: under the distribution it was drawn from.
        top: the most probable ``(token id, raw log-probability)``, best first.
    """

    token_id: int
    raw: float
    processed: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class SequenceStats:
    """Counts of one sequence.

    Attributes:
        prompt_tokens: tokens of the prompt.
        rounds: verify forwards it took part in.
        drafted: drafts that were verified.
        accepted: drafts that were accepted, including some past the end of the output.
    """

    prompt_tokens: int
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per round."""
        return (self.accepted + self.rounds) / self.rounds if self.rounds else 0.0


@dataclass(slots=True)
class Output:
    """One finished sequence.

    Attributes:
        index: of its prompt, counted from 0 in the order of the prompts.
        id: the caller's name for it (``"id"`` of a prompt file's line), or ``None``.
        prompt: the prompt's text, when it was given as text.
        token_ids: new tokens. End-of-sequence is included when it ended the output; with a stop
            string they go on to the token that completed it.
        text: decoded without special tokens, cut before a stop string; ``""`` without a tokenizer.
        finish_reason: ``"eos"``, ``"stop"`` (string or id), ``"length"`` or ``"cancelled"``.
        drafted: per token, whether a drafter proposed it.
        logprobs: per token, when asked for.
    """

    index: int
    id: Any
    prompt: str | None
    token_ids: list[int]
    text: str
    finish_reason: str
    stats: SequenceStats
    drafted: list[bool] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None


class Progress(NamedTuple):
    """What one sequence gained in a step.

    Attributes:
        request: whose it is.
        token_ids: its new tokens; those of all steps, one after the other, are the output's.
        output: all of it, when this step ended it.
    """

    request: Request
    token_ids: list[int]
    output: Output | None
