"""One running request on the host: what it has emitted, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .outputs import Output, SequenceStats, TokenLogprob
from .reader import Request


class ActiveSequence:
    """A request in its row: the tokens it has emitted, and when they end it."""

    __slots__ = (
        "_taken",
        "_tokenizer",
        "drafted",
        "finish_reason",
        "logprobs",
        "request",
        "row",
        "stats",
        "text_end",
        "token_ids",
    )

    def __init__(self, request: Request, row: int, tokenizer: Any) -> None:
        self.request = request
        self.row = row
        self.token_ids: list[int] = []
        self.drafted: list[bool] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.text_end: int | None = None
        self.stats = SequenceStats(len(request.prompt_ids))
        self._taken = 0
        self._tokenizer = tokenizer

    @property
    def remaining(self) -> int:
        """Tokens it may still emit."""
        return self.request.max_new_tokens - len(self.token_ids)

    def extend(self, tokens: Sequence[int], accepted: int) -> int:
        """Take over a round's tokens up to the one that ends the sequence.

        The cut comes after acceptance and stop conditions beat the length limit, so it cannot
        bias what is emitted.

        Args:
            tokens: emitted this round; the first ``accepted`` were drafts.

        Returns:
            How many were taken; fewer than given when the sequence ended.
        """
        stop_ids, limit = self.request.stop_ids, self.remaining
        taken = min(len(tokens), limit)
        for i in range(taken):
            if tokens[i] in stop_ids:
                taken = i + 1
                is_stop = tokens[i] in self.request.params.stop_token_ids
                self.finish_reason = "stop" if is_stop else "eos"
                break
        first = len(self.token_ids)
        self.token_ids.extend(tokens[:taken])
        if self.request.params.stop:
            kept = self._cut_at_stop_string(first)
            if kept is not None:
                taken, self.finish_reason = kept - first, "stop"
                del self.token_ids[kept:]
        self.drafted.extend(i < accepted for i in range(taken))
        if self.finish_reason is None and taken == limit:
            self.finish_reason = "length"
        return taken

    def take_new(self) -> list[int]:
        """The tokens since this was last asked for."""
        new = self.token_ids[self._taken :]
        self._taken = len(self.token_ids)
        return new

    def output(self) -> Output:
        """The sequence as it stands."""
        text = self._decode(self.token_ids)[: self.text_end] if self._tokenizer is not None else ""
        wants_logprobs = self.request.params.logprobs is not None
        return Output(
            self.request.index,
            self.request.id,
            self.request.prompt,
            self.token_ids,
            text,
            self.finish_reason or "length",
            self.stats,
            self.drafted,
            self.logprobs[: len(self.token_ids)] if wants_logprobs else None,
        )

    def _cut_at_stop_string(self, first: int) -> int | None:
        """Number of tokens up to the one completing a stop string; sets where the text ends."""
        stops = self.request.params.stop
        # A character takes at most four bytes and a token at least one, so a stop string that ends
        # in the new tokens begins within this many tokens before them.
        start = max(0, first - 4 * max(map(len, stops)) - 4)
        if not any(stop in self._decode(self.token_ids[start:]) for stop in stops):
            return None
        for end in range(first + 1, len(self.token_ids) + 1):
            if any(stop in self._decode(self.token_ids[start:end]) for stop in stops):
                text = self._decode(self.token_ids[:end])
                found = [text.find(stop) for stop in stops]
                self.text_end = min((at for at in found if at >= 0), default=None)
                return end if self.text_end is not None else None
        return None

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)
