"""What a request gets back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from decoder.errors import RequestFailed, UndefinedNumbers

from .reader import Request, Unreadable

_SAID = 5  # failed requests that a message tells of


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


# Why a request failed whose logits were at fault.
UNDEFINED = (
    "logits must define a distribution at every position, got NaN, +inf or every token banned"
)


@dataclass(slots=True)
class Output:
    """One finished sequence, or what there is of a request that failed.

    Attributes:
        index: of its prompt, counted from 0 in the order of the prompts.
        id: the caller's name for it (``"id"`` of a prompt file's line), or ``None``.
        prompt: the prompt's text, when it was given as text; of a chat, as its template renders it.
        token_ids: new tokens. End-of-sequence is included when it ended the output; with a stop
            string they go on to the token that completed it.
        text: decoded without special tokens and the end-of-sequence that ended it, cut before a
            stop string; ``""`` without a tokenizer.
        finish_reason: ``"eos"``, ``"stop"`` (string or id), ``"length"``, ``"cancelled"`` or
            ``"error"``.
        drafted: per token, whether a drafter proposed it.
        logprobs: per token, when asked for.
        error: why it failed, in one line; ``None`` unless ``finish_reason`` is ``"error"``.
        seed: what its tokens were drawn with, given or not; ``None`` for greedy requests.
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
    error: str | None = None
    seed: int | None = None

    @property
    def undefined(self) -> bool:
        """Whether it failed by logits that define no distribution."""
        return self.error is not None and self.error.endswith(UNDEFINED)


def failure(outputs: Sequence[Output]) -> RequestFailed | None:
    """What to raise for ``outputs``, ``None`` if none of them failed."""
    failed = [output for output in outputs if output.error is not None]
    if not failed:
        return None
    said = [str(output.error) for output in failed[:_SAID]]
    more = f"; and {len(failed) - _SAID} more" if len(failed) > _SAID else ""
    kind = UndefinedNumbers if any(output.undefined for output in failed) else RequestFailed
    count = f"{len(failed)} of {len(outputs)} requests failed"
    return kind(f"{count}: {'; '.join(said)}{more}", outputs)


def unread(prompt: Unreadable) -> Output:
    """The output of a prompt that could not be read."""
    stats = SequenceStats(0)
    return Output(
        prompt.index, prompt.id, prompt.prompt, [], "", "error", stats, error=str(prompt.error)
    )


class Progress(NamedTuple):
    """What one sequence gained in a step.

    Attributes:
        request: whose it is.
        token_ids: its new tokens; those of all steps, one after the other, are the output's.
        output: all of it, when this step ended it; a request that failed is reported by its
            ``output.error``, also without new tokens.
    """

    request: Request
    token_ids: list[int]
    output: Output | None
